"""Attack a model by a list of figures and note what happened to every image."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advml.attacks.threat import NORMS
from advml.data.datasets import Split
from advml.errors import Failure
from advml.evaluation.plan import Figure
from advml.networks.models import Network
from advml.runtime.machine import Machine, derived_seed, generator_for, own_randomness
from advml.runtime.memo import Memo, Parts

ROUNDING = 1e-5  # how far beyond the ball float32 may carry an honest attack
NOT_FINITE = -1  # the predicted class where the logits are no numbers: nobody's label, so a wrong one


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one figure did to each of the n images that it was aimed at.

    Attributes:
        rows: (n,) places in the split.
        right: (n,) bool, still classified right.
        predicted: (n,) class of the example that broke the image, of the clean image where none did; NOT_FINITE.
        distance: (n,) size of the perturbation that broke it; NaN where none did.
        forward, backward: (n,) passes that the attack has spent on it; of its batch, divided evenly.
        images: (m, C, H, W) adversarial images of the first m, where they are kept.
    """

    rows: Tensor
    right: Tensor
    predicted: Tensor
    distance: Tensor
    forward: Tensor
    backward: Tensor
    images: Tensor | None = None


@dataclass(frozen=True)
class Effort:
    """How an evaluation computes."""

    batch_size: int
    seed: int
    machine: Machine
    keep: int | None = None  # adversarial images to keep of a `kept` figure; None: all


def measure(
    network: nn.Module,
    split: Split,
    figures: Sequence[Figure],
    effort: Effort,
    *,
    memo: Memo | None = None,
    on_batch: Callable[[int, float], None] = lambda done, standing: None,
) -> dict[str, Outcome]:
    """The outcome of every figure, by name; the first figure must be the clean one.

    Images that are broken leave a figure's next restart, and images broken by any figure leave those with `left_only`: but only
    where the objective is per sample. A contrastive one couples the batch. Predictions are those of a copy made beforehand.

    Args:
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        memo: remembers every batch of every figure.
        on_batch: told after each batch how many of len(figures) * N images are done, and the share of all that stands so far.
    Raises:
        Failure: an attack left its ball or the box.
    """
    network.eval()
    scorer, memo = _copy(network), memo or Memo()
    outcomes: dict[str, Outcome] = {}
    total, everything = len(split.labels), torch.arange(len(split.labels))
    standing = torch.ones(total, dtype=torch.bool)
    for number, figure in enumerate(figures):
        rows = standing.nonzero().squeeze(1) if figure.left_only else everything
        clean = next(iter(outcomes.values()), None)
        parts = []
        for batch, chosen in enumerate(rows.split(effort.batch_size) if len(rows) else ()):
            batch_of = _Batch(network, scorer, figure, split, chosen, clean, effort, batch)
            part = memo(f"{figure.name} batch {batch}", batch_of.measure_alone)
            parts.append(part)
            standing[chosen] &= part["right"]
            on_batch(number * total + int(chosen[-1]) + 1, float(standing.double().mean()))
        outcomes[figure.name] = _joined(rows, parts)
    on_batch(len(figures) * total, float(standing.double().mean()))
    return outcomes


def _copy(network: nn.Module) -> nn.Module:
    """An attack works on the network, predictions come from a copy that it cannot have touched."""
    try:
        return copy.deepcopy(network)
    except (RuntimeError, TypeError):  # a foreign module may hold what cannot be copied
        return network


def _joined(rows: Tensor, parts: list[Parts]) -> Outcome:
    if not parts:  # nothing was left to be attacked
        nothing = torch.empty(0)
        return Outcome(rows, nothing.bool(), nothing.long(), nothing, nothing, nothing)
    joined = {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}
    return Outcome(rows, **joined)


@dataclass(frozen=True, eq=False)
class _Batch:
    """One batch of one figure."""

    network: nn.Module
    scorer: nn.Module
    figure: Figure
    split: Split
    rows: Tensor
    clean: Outcome | None
    effort: Effort
    number: int

    def measure_alone(self) -> Parts:
        """`measure`, with random numbers of its own for models that draw some: the same wherever an interrupted evaluation goes on."""
        with own_randomness(derived_seed("model", self.figure.name, self.effort.seed, self.number), self.effort.machine.device):
            return self.measure()

    def measure(self) -> Parts:
        machine, figure = self.effort.machine, self.figure
        images, labels = machine.images(self.split.images[self.rows]), self.split.labels[self.rows].to(machine.device)
        if figure.craft is None or self.clean is None:
            predicted = self._predict(images)
            found = {"right": predicted == labels, "predicted": predicted} | {name: torch.zeros(len(labels)) for name in PASSES}
            return found | {"distance": torch.full((len(labels),), torch.nan)}
        found = {name: getattr(self.clean, name)[self.rows].to(machine.device) for name in ("right", "predicted", "distance", *PASSES)}
        for restart in range(figure.restarts):
            kept = self._wanted() if restart == 0 else 0
            everyone = figure.coupled or kept
            chosen = torch.arange(len(labels), device=machine.device) if everyone else found["right"].nonzero().squeeze(1)
            if not len(chosen):
                break
            adversarial, passes = self._attack(images[chosen], labels[chosen], restart)
            self._note(found, chosen, adversarial, images[chosen], labels[chosen])
            for name in PASSES:
                found[name][chosen] += passes[name] / len(chosen)
            if kept:
                found["images"] = adversarial[:kept].float().cpu().contiguous()
        return found

    def _wanted(self) -> int:
        """How many of this batch's adversarial images are to be kept."""
        if not self.figure.kept:
            return 0
        limit = self.effort.keep
        return len(self.rows) if limit is None else min(len(self.rows), max(0, limit - int(self.rows[0])))

    def _attack(self, images: Tensor, labels: Tensor, restart: int) -> tuple[Tensor, dict[str, int]]:
        generator = generator_for(self.figure.name, self.effort.seed, self.number, restart)
        with self.effort.machine.autocast(), counted(self.network) as passes:
            craft = self.figure.craft if restart == 0 else self.figure.again or self.figure.craft
            adversarial = craft(self.network, images, labels, generator)
        return adversarial, passes

    def _note(self, found: Parts, chosen: Tensor, adversarial: Tensor, images: Tensor, labels: Tensor) -> None:
        """Enter what an attack has done to the chosen images."""
        size = NORMS[self.figure.threat_model.norm].size(adversarial - images)
        self._check(adversarial, size)
        predicted = self._predict(adversarial)
        broken = found["right"][chosen] & (predicted != labels)
        rows = chosen[broken]
        found["right"][rows] = False
        found["predicted"][rows] = predicted[broken]
        found["distance"][rows] = size[broken]

    def _check(self, adversarial: Tensor, size: Tensor) -> None:
        epsilon = self.figure.threat_model.epsilon
        if not (size.max() <= epsilon + ROUNDING and adversarial.min() >= 0 and adversarial.max() <= 1):
            raise Failure(
                f"{self.figure.name} left its threat model: perturbations up to {float(size.max()):g} for epsilon {epsilon:g}, "
                f"pixels from {float(adversarial.min()):g} to {float(adversarial.max()):g}; its figures would mean nothing"
            )

    def _predict(self, images: Tensor) -> Tensor:
        return predict(self.scorer, images, self.effort.machine)


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, machine: Machine) -> Tensor:
    """The class (N,) of each image, NOT_FINITE where the logits are no numbers."""
    with machine.autocast():
        logits = network(images)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NOT_FINITE)


PASSES = ("forward", "backward")


@contextlib.contextmanager
def counted(network: nn.Module) -> Iterator[dict[str, int]]:
    """Within: the images that pass forward through the network's encoder, and the gradients that come back."""
    passes = dict.fromkeys(PASSES, 0)

    def backward(gradient: Tensor) -> None:
        passes["backward"] += len(gradient)

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passes["forward"] += len(inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(backward)

    handle = (network.encoder if isinstance(network, Network) else network).register_forward_hook(forward)
    try:
        yield passes
    finally:
        handle.remove()
