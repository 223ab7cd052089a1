"""List the layers of a network in the order in which they execute, and observe their outputs.

    rows = layers(network, images[:2], select=["blocks"])
    with watching(network, rows, lambda layer, output: ...) as run:
        run(images)

If a module is called more than once, its second call is the layer `name#2`. Tensors in tuples, lists and dictionaries of outputs are
layers with a key: `attention:0`, `encoder:last_hidden_state`. Modules that return a tensor unchanged (identities, dropout in eval mode,
containers) are aliases of the layer that computed it. Results of functions between modules are not observed.
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
from advml.models.network import eval_mode

PREPROCESSING = "normalize"  # first module of a `Network`, which is not a representation
HANDS_ON = (nn.Identity, nn.Dropout)  # modules that return their input unchanged in eval mode
ENCODER = "encoder"  # name of the encoder in a `Network`; other networks consist of the encoder only


@dataclass(frozen=True)
class Layer:
    """One row of a similarity matrix.

    Attributes:
        name: the module's path, with suffix `#2` for its second call in a pass, and so on, and `:key` for a part of its output.
        kind: the module's class.
        shape: of its output for one image.
        aliases: further modules that return the same tensor, in execution order.
        in_encoder: False for classifier and projection head; in external networks, for a final linear layer.
        is_block: whether it is the output of a residual, transformer or other repeated block.
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
    """Function that runs all of a network: encoder and every head of a `Network`, or the forward pass of another network."""
    return getattr(network, "run_all", network.__call__)


def _parts(name: str, output: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a module's output, with their names."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping | tuple | list):
        for key, part in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from _parts(f"{name}:{key}", part)


def _module(name: str) -> str:
    """Path of a layer's module: blocks.0.attention#2:0 -> blocks.0.attention."""
    return name.partition(":")[0].partition("#")[0]


@contextlib.contextmanager
def _calls(network: nn.Module, see: Callable[[str, nn.Module, object], None]) -> Iterator[Run]:
    """Context manager that yields `run(images)`, a pass in eval mode without gradients; `see` is called with each module's output."""
    counts: Counter[str] = Counter()

    def hook(name: str) -> Callable[..., None]:
        def called(module: nn.Module, _: object, output: object) -> None:
            counts[name] += 1
            see(name if counts[name] == 1 else f"{name}#{counts[name]}", module, output)

        return called

    def run(images: Tensor) -> object:
        counts.clear()
        with torch.no_grad():  # not inference mode, which lacks the version counter that reveals in-place changes
            return _forward(network)(images)

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name and name != PREPROCESSING]
    try:
        with eval_mode(network):
            yield run
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Call:
    name: str
    module: nn.Module
    output: Tensor  # kept, so that no later tensor gets its address
    identity: tuple[int, int, int]  # see `_identity`


@dataclass
class _Trace:
    """Record of one pass: outputs with a value for each image, all called modules, and the network's output."""

    calls: list[_Call]
    called: dict[str, nn.Module]
    returned: set[tuple[int, int, int]]


def _identity(tensor: Tensor) -> tuple[int, int, int]:
    """Address, version and size of a tensor: equal if it is returned unchanged, different after a change in place."""
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
    """Called modules without children whose output has no value for each image: attention windows, tables, integers."""
    trace, one = _trace(network, images), {_module(call.name) for call in _trace(network, images[1:]).calls}
    seen = {_module(call.name) for call in trace.calls} & one
    return [name for name, module in trace.called.items() if name not in seen and not list(module.children())]


def layers(network: nn.Module, images: Tensor, *, select: Sequence[str] = ("blocks",)) -> list[Layer]:
    """Layers of a network for a similarity matrix, in execution order.

    Args:
        network: a `Network`, or any torch module that accepts images.
        images: two or more (N, C, H, W); a pass of all gives order and shapes, a pass of fewer shows which outputs have a value per image.
        select: words, each "blocks": outputs of blocks, of the encoder and of the heads; "all": every layer that computes something; or a
            pattern of names such as `layer3.*` or `*.act2` (the prefix `encoder.` may be left out).
    Raises:
        UserError: a pattern matches nothing, or there are no blocks.
    """
    per_image = {call.name for call in _trace(network, images[1:]).calls}  # else e.g. two attention heads would be taken for two images
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
        has_leaf = any(_module(call.name) not in parents for call in calls)  # a module inside of which no other was called
        if block or has_leaf or _outputs(network) & {call.name for call in calls}:
            ends = calls[0].identity in trace.returned and any(isinstance(call.module, nn.Linear) for call in calls)
            found.append(_layer(network, calls, block, wide="blocks" in select, ends=ends))
    return _select(network, found, select)


def _layer(network: nn.Module, calls: list[_Call], block: _Call | None, *, wide: bool, ends: bool) -> Layer:
    """Layer for a group of calls with one output, named after the module that computes it; for `blocks`, after block or widest module."""
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
    """Names of the final modules: encoder and heads."""
    return {name for name, _ in network.named_children() if name != PREPROCESSING} if hasattr(network, ENCODER) else set()


def _blocks(network: nn.Module, groups: list[list[_Call]]) -> set[str]:
    """Names of blocks: composite modules with weights, below the top level, whose output was not computed by such a module inside.

    So stages, which return their last block's output, are not blocks, nor are stems, plain sequences and norms.
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
    for name in handed_on:  # in execution order, in which inner modules return before outer ones
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
            raise UserError("similarity.layers = 'blocks': this backbone has no blocks; use similarity.layers = all, or patterns of names")
        if not matching:
            known = [layer.name for layer in found]
            close = difflib.get_close_matches(word, known, n=5, cutoff=0.3) or known[:5]
            raise UserError(f"similarity.layers: no layer matches {word!r}; choose e.g. from {', '.join(close)}")
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
    """Context manager that yields `run(images)`, which calls `see(row number, output)` for every row while it is computed.

    The output is the network's own tensor, which the next layer may overwrite: use it at once, or copy it.
    """
    numbers = {layer.name: number for number, layer in enumerate(rows)}

    def look(name: str, _: nn.Module, output: object) -> None:
        for part, tensor in _parts(name, output):
            if part in numbers:
                see(numbers[part], tensor)

    with _calls(network, look) as run:
        yield run
