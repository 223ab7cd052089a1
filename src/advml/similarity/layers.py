"""Which layers a network has, in the order in which they execute, and a look at their outputs while they run.

    rows = layers(network, images[:2], select=["blocks"])
    with watching(network, rows, lambda layer, output: ...) as run:
        run(images)

A module may be called more than once; its second call is the layer `name#2`. Modules that hand on a tensor
as they got it (identities, dropout at evaluation, containers) are aliases of the layer that made it, not layers.
"""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
        name: the module's path, with `#2` behind it for its second call in one pass, and so on.
        kind: the module's class.
        shape: of its output for one image.
        aliases: further modules that hand on this very tensor, in execution order.
        in_encoder: False for the classifier and the projection head.
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


Run = Callable[[Tensor], None]


def _forward(network: nn.Module) -> Run:
    """A pass through everything the network has: our networks' heads are called one by one, others whole."""
    return getattr(network, "run_all", network.__call__)


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

    def run(images: Tensor) -> None:
        counts.clear()
        with torch.no_grad():  # not inference mode: the version counter tells a tensor changed in place from one handed on
            _forward(network)(images)

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
    identity: tuple[int, int, int]  # address, version, size: the same for a tensor handed on, not for one changed in place


def _trace(network: nn.Module, images: Tensor) -> list[_Call]:
    """All calls of one pass whose output has a value for each image."""
    calls: list[_Call] = []

    def see(name: str, module: nn.Module, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim >= 2 and len(output) == len(images):
            calls.append(_Call(name, module, output, (output.data_ptr(), output._version, output.numel())))

    with _calls(network, see) as run:
        run(images)
    return calls


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
    per_image = {call.name for call in _trace(network, images[1:])}  # else two attention heads, say, pass for two images
    groups: dict[tuple[int, int, int], list[_Call]] = {}
    for call in _trace(network, images):
        if call.name in per_image:
            groups.setdefault(call.identity, []).append(call)
    groups = {key: calls for key, calls in groups.items() if not all(isinstance(call.module, HANDS_ON) for call in calls)}
    blocks = _blocks(network, list(groups.values()))
    found = []
    for calls in groups.values():
        block = next((call for call in calls if call.name.partition("#")[0] in blocks), None)
        has_leaf = any(not list(call.module.children()) for call in calls)
        if block or has_leaf or _outputs(network) & {call.name for call in calls}:
            found.append(_layer(network, calls, block, wide="blocks" in select))
    return _select(network, found, select)


def _layer(network: nn.Module, calls: list[_Call], block: _Call | None, *, wide: bool) -> Layer:
    """A row is called by the module that computes it, among blocks by the block or the widest module that ends in it."""
    named = (block or calls[-1]) if wide else calls[0]
    return Layer(
        name=named.name,
        kind=type(named.module).__name__,
        shape=tuple(named.output.shape[1:]),
        aliases=tuple(call.name for call in calls if call is not named),
        in_encoder=not hasattr(network, ENCODER) or named.name.split(".")[0] == ENCODER,
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
        names = {call.name.partition("#")[0] for call in calls}
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
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.removeprefix(f"{ENCODER}."), pattern) for name in layer.names)


@contextlib.contextmanager
def watching(network: nn.Module, rows: Sequence[Layer], see: Callable[[int, Tensor], None]) -> Iterator[Run]:
    """Within: `run(images)` calls `see(row number, output)` for every row while it is computed.

    The output is the network's own tensor, which the next layer may overwrite: use it at once, keep nothing of it.
    """
    numbers = {layer.name: number for number, layer in enumerate(rows)}

    def look(name: str, _: nn.Module, output: object) -> None:
        if name in numbers:
            see(numbers[name], output)

    with _calls(network, look) as run:
        yield run
