"""Which layers a network has, in the order in which they execute, and a look at their outputs while they run.

    rows = layers(network, images[:2], select=["blocks"])
    with watching(network, rows, lambda layer, output: ...) as run:
        run(images)

A module may be called more than once; its second call is the layer `name#2`. Tuples, lists and dictionaries of outputs are looked into:
`attention:0`, `encoder:last_hidden_state`. Modules that hand on a tensor as they got it (identities, dropout at evaluation,
containers) are aliases of the layer that made it, not layers. What functions compute between modules is not seen.
"""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from advml.core.errors import UserError

PREPROCESSING = "normalize"  # our networks' first module: constants, no representation
HANDS_ON = (nn.Identity, nn.Dropout)  # nothing of their own, whatever made the tensor that they were given
ENCODER = "encoder"  # our networks' child of that name; any other module is all encoder


@dataclass(frozen=True)
class Layer:
    """One row of a similarity matrix.

    Attributes:
        name: the module's path, with `#2` behind it for its second call in one pass, and so on, and `:key` for a part of its output.
        kind: the module's class.
        shape: of its output for one image.
        aliases: further modules that hand on this very tensor, in execution order.
        in_encoder: False for the classifier and the projection head; of others' networks, for the linear layer that they end in.
        is_block: the output of a residual, transformer or other repeated block.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    in_encoder: bool = True
    is_block: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


Run = Callable[[Tensor], object]


def _forward(network: nn.Module) -> Run:
    """A pass through everything the network has: our networks' heads are called one by one, others whole."""
    return getattr(network, "run_all", network.__call__)


def _parts(name: str, output: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a module has returned, with their names."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping | tuple | list):
        for key, part in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from _parts(f"{name}:{key}", part)


def _module(name: str) -> str:
    """blocks.0.attention#2:0 -> blocks.0.attention"""
    return name.partition(":")[0].partition("#")[0]


@contextlib.contextmanager
def _calls(network: nn.Module, see: Callable[[str, nn.Module, object], None]) -> Iterator[Run]:
    """Within: `run(images)` is one pass in eval mode, without gradients; `see` gets every call as it returns."""
    counts: Counter[str] = Counter()
    modes = {module: module.training for module in network.modules()}

    def hook(name: str) -> Callable[..., None]:
        def called(module: nn.Module, _: object, output: object) -> None:
            counts[name] += 1
            see(name if counts[name] == 1 else f"{name}#{counts[name]}", module, output)

        return called

    def run(images: Tensor) -> object:
        counts.clear()
        with torch.no_grad():  # not inference mode: the version counter tells a tensor changed in place from one handed on
            return _forward(network)(images)

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name and name != PREPROCESSING]
    network.eval()
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


@dataclass
class _Call:
    name: str
    module: nn.Module
    output: Tensor  # kept alive, so that no later tensor gets its address
    identity: tuple[int, int, int]  # see `_identity`


@dataclass
class _Trace:
    """One pass: the outputs that have a value for each image, all modules that were called, and what the network returned."""

    calls: list[_Call]
    called: dict[str, nn.Module]
    returned: set[tuple[int, int, int]]


def _identity(tensor: Tensor) -> tuple[int, int, int]:
    """Address, version, size: the same for a tensor handed on, not for one changed in place."""
    return tensor.data_ptr(), tensor._version, tensor.numel()


def _trace(network: nn.Module, images: Tensor) -> _Trace:
    calls: list[_Call] = []
    called: dict[str, nn.Module] = {}

    def see(name: str, module: nn.Module, output: object) -> None:
        called[_module(name)] = module
        for part, tensor in _parts(name, output):
            if tensor.is_floating_point() and tensor.ndim >= 2 and len(tensor) == len(images):
                calls.append(_Call(part, module, tensor, _identity(tensor)))

    with _calls(network, see) as run:
        returned = {_identity(tensor) for _, tensor in _parts("", run(images))}
    return _Trace(calls, called, returned)


def left_out(network: nn.Module, images: Tensor) -> list[str]:
    """Modules without children that were called and have no value for each image: windows of attention, tables, integers."""
    trace, one = _trace(network, images), {_module(call.name) for call in _trace(network, images[1:]).calls}
    seen = {_module(call.name) for call in trace.calls} & one
    return [name for name, module in trace.called.items() if name not in seen and not list(module.children())]


def layers(network: nn.Module, images: Tensor, *, select: Sequence[str] = ("blocks",)) -> list[Layer]:
    """The rows of a similarity matrix, in execution order.

    Args:
        network: ours or any torch module that takes images.
        images: two or more (N, C, H, W); a pass of them shows the order and the shapes, one of fewer what has a value for each.
        select: words, each "blocks": the blocks' outputs, the encoder's output and the heads'; "all": every layer that
            computes something; or a pattern of names such as `layer3.*` or `*.act2` (`encoder.` in front may be left out).
    Raises:
        UserError: a pattern matches nothing, or there are no blocks.
    """
    per_image = {call.name for call in _trace(network, images[1:]).calls}  # else two attention heads, say, pass for two images
    groups: dict[tuple[int, int, int], list[_Call]] = {}
    trace = _trace(network, images)
    parents = {name.rpartition(".")[0] for name in trace.called}
    for call in trace.calls:
        if call.name in per_image:
            groups.setdefault(call.identity, []).append(call)
    groups = {key: calls for key, calls in groups.items() if not all(isinstance(call.module, HANDS_ON) for call in calls)}
    blocks = _blocks(network, list(groups.values()))
    found = []
    for calls in groups.values():
        block = next((call for call in calls if _module(call.name) in blocks), None)
        has_leaf = any(_module(call.name) not in parents for call in calls)  # nothing inside of it was called
        if block or has_leaf or _outputs(network) & {call.name for call in calls}:
            ends = calls[0].identity in trace.returned and any(isinstance(call.module, nn.Linear) for call in calls)
            found.append(_layer(network, calls, block, wide="blocks" in select, ends=ends))
    return _select(network, found, select)


def _layer(network: nn.Module, calls: list[_Call], block: _Call | None, *, wide: bool, ends: bool) -> Layer:
    """A row is called by the module that computes it, among blocks by the block or the widest module that ends in it."""
    named = (block or calls[-1]) if wide else calls[0]
    return Layer(
        name=named.name,
        kind=type(named.module).__name__,
        shape=tuple(named.output.shape[1:]),
        aliases=tuple(call.name for call in calls if call is not named),
        in_encoder=named.name.split(".")[0] == ENCODER if hasattr(network, ENCODER) else not ends,
        is_block=block is not None,
    )


def _outputs(network: nn.Module) -> set[str]:
    """What the whole network ends in: encoder and heads."""
    return {name for name, _ in network.named_children() if name != PREPROCESSING} if hasattr(network, ENCODER) else set()


def _blocks(network: nn.Module, groups: list[list[_Call]]) -> set[str]:
    """Names of blocks: modules with weights inside, below the top level, whose output no such module inside of them made.

    So stages, which end in their last block's output, are no blocks, and neither are stems, plain sequences and norms.
    """
    handed_on: dict[str, set[str]] = {}
    for calls in groups:
        names = {_module(call.name) for call in calls}
        for name in names:
            handed_on.setdefault(name, set()).update(names)
    encoder = f"{ENCODER}." if hasattr(network, ENCODER) else ""
    modules = dict(network.named_modules())

    def is_composite(name: str) -> bool:
        module = modules[name]
        has_weights = any(parameter.ndim >= 2 for parameter in module.parameters())
        return has_weights and bool(list(module.children())) and not isinstance(module, nn.Sequential | nn.ModuleList)

    found: set[str] = set()
    for name in handed_on:  # in execution order: a block's inner modules return before it, so outer ones are sorted out below
        inside = name.startswith(encoder) and "." in name.removeprefix(encoder)
        inner = {other for other in handed_on[name] if other.startswith(f"{name}.") and is_composite(other)}
        if inside and is_composite(name) and not inner:
            found.add(name)
    return {name for name in found if not any(name.startswith(f"{other}.") for other in found)}


def _select(network: nn.Module, found: list[Layer], select: Sequence[str]) -> list[Layer]:
    chosen: set[str] = set()
    for word in select:
        matching = [layer for layer in found if _is_meant(network, layer, word)]
        if not matching and word == "blocks":
            raise UserError("similarity.layers = 'blocks': this backbone has none; use similarity.layers = all, or patterns of names")
        if not matching:
            known = [layer.name for layer in found]
            close = difflib.get_close_matches(word, known, n=5, cutoff=0.3) or known[:5]
            raise UserError(f"similarity.layers: no layer is called {word!r}; there are e.g. {', '.join(close)}")
        chosen |= {layer.name for layer in matching}
    return [layer for layer in found if layer.name in chosen]


def _is_meant(network: nn.Module, layer: Layer, word: str) -> bool:
    if word == "blocks":
        return layer.is_block or bool(_outputs(network) & set(layer.names))
    return word == "all" or _matches(layer, word)


def _matches(layer: Layer, pattern: str) -> bool:
    names = {form for name in layer.names for form in (name, name.partition(":")[0])}
    return any(fnmatchcase(form, pattern) for name in names for form in (name, name.removeprefix(f"{ENCODER}.")))


@contextlib.contextmanager
def watching(network: nn.Module, rows: Sequence[Layer], see: Callable[[int, Tensor], None]) -> Iterator[Run]:
    """Within: `run(images)` calls `see(row number, output)` for every row while it is computed.

    The output is the network's own tensor, which the next layer may overwrite: use it at once, keep nothing of it.
    """
    numbers = {layer.name: number for number, layer in enumerate(rows)}

    def look(name: str, _: nn.Module, output: object) -> None:
        for part, tensor in _parts(name, output):
            if part in numbers:
                see(numbers[part], tensor)

    with _calls(network, look) as run:
        yield run
