"""Attack a model by a list of figures and note what happened to every image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advml.attacks.isolation import copied
from advml.attacks.per_image_rng import PerImageGenerator
from advml.attacks.threat_model import NORMS, ThreatModel
from advml.data.datasets import Split
from advml.errors import Failure
from advml.evaluation.attack_suite import AttackSpec
from advml.evaluation.samples import PASSES, Outcome
from advml.networks.models import Network
from advml.runtime.machine import Machine, derived_seed, own_randomness
from advml.runtime.memo import Memo, Parts

NOTED = ("right", "predicted", "distance", *PASSES)  # of every image


@dataclass(frozen=True)
class Effort:
    """How an evaluation computes."""

    batch_size: int
    seed: int
    machine: Machine
    keep: int | None = None  # adversarial images to keep of a `kept` figure; None: all


def run_attacks(
    network: nn.Module,
    split: Split,
    figures: Sequence[AttackSpec],
    effort: Effort,
    *,
    memo: Memo | None = None,
    scorer: Scorer | None = None,
    on_batch: Callable[[int, float], None] = lambda done, standing: None,
) -> dict[str, Outcome]:
    """The outcome of every figure, by name; the first figure must be the clean one.

    Images that are broken leave a figure's next restart, and images broken by any figure leave those with `left_only`: but only
    where the objective is per sample. A contrastive one couples the batch. Random numbers of attacks are each image's own
    (`PerImageGenerator`): what one on a per-sample objective does to an image does not depend on the rest of the batch, up to rounding.

    Args:
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        memo: remembers every restart of every batch of every figure.
        scorer: predicts; None: a copy of the network, made beforehand.
        on_batch: told after each batch how many of len(figures) * N images are done, and the share of all that stands so far.
    Raises:
        Failure: an attack left its ball or the box.
    """
    network.eval()
    scorer, memo = scorer or Scorer(copied(network), effort.machine), memo or Memo()
    outcomes: dict[str, Outcome] = {}
    total, everything = len(split.labels), torch.arange(len(split.labels))
    standing = torch.ones(total, dtype=torch.bool)
    for number, figure in enumerate(figures):
        rows = standing.nonzero().squeeze(1) if figure.left_only else everything
        clean = next(iter(outcomes.values()), None)
        parts = []
        for batch, chosen in enumerate(rows.split(effort.batch_size) if len(rows) else ()):
            part = _Batch(network, scorer, figure, split, chosen, clean, effort, batch).remembered(memo)
            parts.append(part)
            standing[chosen] &= part["right"]
            on_batch(number * total + int(chosen[-1]) + 1, float(standing.double().mean()))
        outcomes[figure.name] = _joined(rows, parts)
    on_batch(len(figures) * total, float(standing.double().mean()))
    return outcomes


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
    scorer: Scorer
    figure: AttackSpec
    split: Split
    rows: Tensor
    clean: Outcome | None
    effort: Effort
    number: int

    def remembered(self, memo: Memo) -> Parts:
        """The outcome after all restarts. Each is a part of its own, so that the end of a process costs one of them at most."""
        part = f"{self.figure.name} batch {self.number}"
        found = memo(part, lambda: self._alone(0, None))
        if self._wanted() and "images" not in found:  # forgotten when an earlier evaluation was written, whose outcomes stand
            found["images"] = self._alone(0, None)["images"]
        for restart in range(1, self.figure.restarts):
            if not (self.figure.coupled or found["right"].any()):
                break
            found |= memo(f"{part} restart {restart}", lambda restart=restart, found=found: self._alone(restart, found))
        return found

    def _alone(self, restart: int, before: Parts | None) -> Parts:
        """`measure`, with random numbers of its own for models that draw some: the same wherever an interrupted evaluation goes on."""
        with own_randomness(derived_seed("model", self.figure.name, self.effort.seed, self.number, restart), self.effort.machine.device):
            return self.measure(restart, before)

    def measure(self, restart: int, before: Parts | None) -> Parts:
        """One restart, on what those before it have left over."""
        machine, figure = self.effort.machine, self.figure
        images, labels = machine.images(self.split.images[self.rows]), self.split.labels[self.rows].to(machine.device)
        if figure.craft is None or self.clean is None:
            predicted = self.scorer.predict(images)
            found = {"right": predicted == labels, "predicted": predicted} | {name: torch.zeros(len(labels)) for name in PASSES}
            return found | {"distance": torch.full((len(labels),), torch.nan)}
        clean = {name: getattr(self.clean, name)[self.rows] for name in NOTED}
        found = {name: (before or clean)[name].to(machine.device, copy=True) for name in NOTED}
        kept = self._wanted() if restart == 0 else 0
        everyone = torch.ones_like(found["right"]) if figure.coupled or kept else found["right"]
        chosen = everyone.nonzero().squeeze(1)
        if len(chosen):
            adversarial, passes = self._attack(images[chosen], labels[chosen], restart)
            self._note(found, chosen, adversarial, images[chosen], labels[chosen])
            for name in PASSES:
                found[name][chosen] += passes[name] / len(chosen)
            if kept:
                found["images"] = adversarial[:kept].float().cpu().contiguous()
        return found

    def _wanted(self) -> int:
        """How many of this batch's adversarial images are to be kept."""
        if not self.figure.kept or self.figure.craft is None or self.clean is None:  # the latter two: clean images
            return 0
        limit = self.effort.keep
        return len(self.rows) if limit is None else min(len(self.rows), max(0, limit - int(self.rows[0])))

    def _attack(self, images: Tensor, labels: Tensor, restart: int) -> tuple[Tensor, dict[str, int]]:
        draws = PerImageGenerator(derived_seed(self.figure.name, self.effort.seed, restart))
        with self.effort.machine.autocast(), counted(self.network) as passes:
            craft = self.figure.craft if restart == 0 else self.figure.again or self.figure.craft
            adversarial = craft(self.network, images, labels, draws)
        return adversarial, passes

    def _note(self, found: Parts, chosen: Tensor, adversarial: Tensor, images: Tensor, labels: Tensor) -> None:
        """Enter what an attack has done to the chosen images."""
        predicted, size = self.scorer.judge(self.figure.name, adversarial, images, threat_model=self.figure.threat_model)
        broken = found["right"][chosen] & (predicted != labels)
        rows = chosen[broken]
        found["right"][rows] = False
        found["predicted"][rows] = predicted[broken]
        found["distance"][rows] = size[broken]


# Whether an example counts: a copy of the model decides, which no attack can have touched. A model that cannot be copied decides itself.

ROUNDING = 1e-5  # how far beyond the ball float32 may carry an honest attack
NOT_FINITE = -1  # the predicted class where the logits are no numbers: nobody's label, so a wrong one


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, machine: Machine) -> Tensor:
    """The class (N,) of each image, NOT_FINITE where the logits are no numbers."""
    with machine.autocast():
        logits = network(images)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NOT_FINITE)


@dataclass(frozen=True, eq=False)
class Scorer:
    """The copy that decides, and where it computes."""

    network: nn.Module
    machine: Machine

    def predict(self, images: Tensor) -> Tensor:
        """See `predict`."""
        return predict(self.network, images, self.machine)

    def judge(self, attack: str, adversarial: Tensor, images: Tensor, *, threat_model: ThreatModel) -> tuple[Tensor, Tensor]:
        """What the adversarial images (N, C, H, W) are taken for (N,), and their distances (N,) from the images.

        Raises:
            Failure: one of them lies outside of ball or box.
        """
        size, epsilon = NORMS[threat_model.norm].size(adversarial - images), threat_model.epsilon
        if not (size.max() <= epsilon + ROUNDING and adversarial.min() >= 0 and adversarial.max() <= 1):
            raise Failure(
                f"{attack} left its threat model: perturbations up to {float(size.max()):g} for epsilon {epsilon:g}, "
                f"pixels from {float(adversarial.min()):g} to {float(adversarial.max()):g}; its figures would mean nothing"
            )
        return self.predict(adversarial), size


# What attacks cost


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
