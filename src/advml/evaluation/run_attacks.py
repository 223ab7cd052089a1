"""Run the attacks of an evaluation on a model, and record the outcome of every image."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from advml.attacks.isolation import copied
from advml.attacks.per_image_rng import PerImageGenerator
from advml.attacks.threat_model import NORMS, ThreatModel
from advml.core.device import Machine, derived_seed, own_randomness
from advml.core.errors import Failure
from advml.core.result_cache import Memo, Parts
from advml.data.datasets import Split
from advml.evaluation.attack_suite import CLEAN_IMAGES, AttackSpec
from advml.evaluation.samples import PASSES, Outcome
from advml.models.micro_batches import recomputing
from advml.models.network import Network

NOTED = ("right", "predicted", "distance", *PASSES)  # recorded for every image
ROUNDING = 1e-5  # distance beyond the ball that float32 rounding can cause
NOT_FINITE = -1  # predicted class if logits are not finite; equals no label, so it counts as wrong


def run_attacks(
    network: nn.Module,
    scorer: Scorer,
    split: Split,
    attacks: Sequence[AttackSpec],
    *,
    batch_size: int,
    seed: int,
    keep: int | None = None,
    memo: Memo | None = None,
    on_batch: Callable[[int, float], None] = lambda done, standing: None,
) -> dict[str, Outcome]:
    """Run all attacks; returns their outcomes by name. The first "attack" must be the clean images.

    Broken images are left out of an attack's later restarts, and of later attacks with `left_only`, except for objectives that couple
    the batch (contrastive ones). Random numbers are drawn per image (`PerImageGenerator`), so the result for an image under a per-sample
    objective does not depend on the rest of the batch, up to rounding.

    Args:
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        scorer: judges success, with a copy of the network that was made before any attack.
        seed: of all random numbers.
        keep: number of adversarial images to store of an attack with `kept`; None: all.
        memo: stores every restart of every batch of every attack.
        on_batch: called after each batch with the number of images done, out of len(attacks) * N, and the worst-case accuracy so far.
    Raises:
        Failure: an attack left its ball or the box.
    """
    network.eval()
    memo = memo or Memo()
    outcomes: dict[str, Outcome] = {}
    total, everything = len(split.labels), torch.arange(len(split.labels))
    standing = torch.ones(total, dtype=torch.bool)
    for number, attack in enumerate(attacks):
        rows = standing.nonzero().squeeze(1) if attack.left_only else everything
        clean = next(iter(outcomes.values()), None)
        parts = []
        for batch, chosen in enumerate(rows.split(batch_size) if len(rows) else ()):
            part = _Batch(network, scorer, attack, split, chosen, clean, seed, keep, batch).remembered(memo)
            parts.append(part)
            standing[chosen] &= part["right"]
            on_batch(number * total + int(chosen[-1]) + 1, float(standing.double().mean()))
        outcomes[attack.name] = _joined(rows, parts)
    on_batch(len(attacks) * total, float(standing.double().mean()))
    return outcomes


def kept_images(
    network: nn.Module, split: Split, attack: AttackSpec, machine: Machine, *, batch_size: int, seed: int, keep: int | None
) -> Tensor:
    """Adversarial images of this attack, identical to those that `evaluate` stores, without the rest of the evaluation."""
    whole = None if keep is None else batch_size * math.ceil(keep / batch_size)  # whole batches, because others round differently
    some, once = Split(split.images[:whole], split.labels[:whole]), replace(attack, restarts=1)
    asked = (network, Scorer.of(network, machine), some, [CLEAN_IMAGES, once])
    return run_attacks(*asked, batch_size=batch_size, seed=seed, keep=keep)[once.name].images


def _joined(rows: Tensor, parts: list[Parts]) -> Outcome:
    if not parts:  # no images were left to attack
        nothing = torch.empty(0)
        return Outcome(rows, nothing.bool(), nothing.long(), nothing, nothing, nothing)
    joined = {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}
    return Outcome(rows, **joined)


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, machine: Machine) -> Tensor:
    """Predicted class (N,) of each image; NOT_FINITE if its logits are not finite."""
    with machine.autocast():
        logits = network(images)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NOT_FINITE)


@dataclass(frozen=True, eq=False)
class Scorer:
    """Judges adversarial examples with a copy of the model that was made before any attack.

    A model that cannot be copied is used itself, and gets the flag `not_copied`.
    """

    network: nn.Module
    machine: Machine

    @classmethod
    def of(cls, network: nn.Module, machine: Machine) -> Scorer:
        """Scorer with a copy of the network; switches the network to eval mode, too."""
        return cls(copied(network.eval()), machine)

    def predict(self, images: Tensor) -> Tensor:
        """See `predict`."""
        return predict(self.network, images, self.machine)

    def judge(self, attack: str, adversarial: Tensor, images: Tensor, *, threat_model: ThreatModel) -> tuple[Tensor, Tensor]:
        """Predicted classes (N,) of adversarial images (N, C, H, W), and their distances (N,) from the images.

        Raises:
            Failure: an image is outside of ball or box.
        """
        size, epsilon = NORMS[threat_model.norm].size(adversarial - images), threat_model.epsilon
        if not (size.max() <= epsilon + ROUNDING and adversarial.min() >= 0 and adversarial.max() <= 1):
            raise Failure(
                f"{attack} left its threat model: perturbations up to {float(size.max()):g} for epsilon {epsilon:g}, "
                f"pixels from {float(adversarial.min()):g} to {float(adversarial.max()):g}; its result is invalid"
            )
        return self.predict(adversarial), size


@dataclass(frozen=True, eq=False)
class _Batch:
    """One batch of images under one attack."""

    network: nn.Module
    scorer: Scorer
    attack: AttackSpec
    split: Split
    rows: Tensor
    clean: Outcome | None
    seed: int
    keep: int | None
    number: int

    def remembered(self, memo: Memo) -> Parts:
        """Outcome after all restarts, each of which is stored, so that a killed process loses at most one."""
        part = f"{self.attack.name} batch {self.number}"
        found = memo(part, lambda: self._alone(0, None))
        if self._wanted() and "images" not in found:  # images are deleted when an evaluation is written, outcomes are kept
            found["images"] = self._alone(0, None)["images"]
        for restart in range(1, self.attack.restarts):
            if not (self.attack.coupled or found["right"].any()):
                break
            found |= memo(f"{part} restart {restart}", lambda restart=restart, found=found: self._alone(restart, found))
        return found

    def _alone(self, restart: int, before: Parts | None) -> Parts:
        """Call `measure` with a global RNG seeded for this restart, so that random models give the same result after an interruption."""
        device = self.scorer.machine.device
        with own_randomness(derived_seed("model", self.attack.name, self.seed, self.number, restart), device):
            return self.measure(restart, before)

    def measure(self, restart: int, before: Parts | None) -> Parts:
        """Run one restart on the images that survive the earlier ones."""
        machine, attack = self.scorer.machine, self.attack
        images, labels = machine.images(self.split.images[self.rows]), self.split.labels[self.rows].to(machine.device)
        if attack.craft is None or self.clean is None:
            predicted = self.scorer.predict(images)
            found = {"right": predicted == labels, "predicted": predicted} | {name: torch.zeros(len(labels)) for name in PASSES}
            return found | {"distance": torch.full((len(labels),), torch.nan)}
        clean = {name: getattr(self.clean, name)[self.rows] for name in NOTED}
        found = {name: (before or clean)[name].to(machine.device, copy=True) for name in NOTED}
        kept = self._wanted() if restart == 0 else 0
        everyone = torch.ones_like(found["right"]) if attack.coupled or kept else found["right"]
        chosen = everyone.nonzero().squeeze(1)
        if len(chosen):
            adversarial, passes = self._attacked(images[chosen], labels[chosen], restart)
            self._note(found, chosen, adversarial, images[chosen], labels[chosen])
            for name in PASSES:
                found[name][chosen] += passes[name] / len(chosen)
            if kept:
                found["images"] = adversarial[:kept].float().cpu().contiguous()
        return found

    def _wanted(self) -> int:
        """Number of this batch's adversarial images to store."""
        if not self.attack.kept or self.attack.craft is None or self.clean is None:  # the last two mean clean images
            return 0
        return len(self.rows) if self.keep is None else min(len(self.rows), max(0, self.keep - int(self.rows[0])))

    def _attacked(self, images: Tensor, labels: Tensor, restart: int) -> tuple[Tensor, dict[str, int]]:
        generator = PerImageGenerator(derived_seed(self.attack.name, self.seed, restart))
        with self.scorer.machine.autocast(), counted(self.network) as passes:
            craft = self.attack.craft if restart == 0 else self.attack.again or self.attack.craft
            adversarial = craft(self.network, images, labels, generator)
        return adversarial, passes

    def _note(self, found: Parts, chosen: Tensor, adversarial: Tensor, images: Tensor, labels: Tensor) -> None:
        """Record the outcome of an attack on the chosen images."""
        predicted, size = self.scorer.judge(self.attack.name, adversarial, images, threat_model=self.attack.threat_model)
        broken = found["right"][chosen] & (predicted != labels)
        rows = chosen[broken]
        found["right"][rows] = False
        found["predicted"][rows] = predicted[broken]
        found["distance"][rows] = size[broken]


@contextlib.contextmanager
def counted(network: nn.Module) -> Iterator[dict[str, int]]:
    """Context manager that counts the images that pass forward through the network's encoder, and the gradients that come back."""
    passes = dict.fromkeys(PASSES, 0)

    def backward(gradient: Tensor) -> None:
        passes["backward"] += len(gradient)

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if recomputing():
            return
        passes["forward"] += len(inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(backward)

    handle = (network.encoder if isinstance(network, Network) else network).register_forward_hook(forward)
    try:
        yield passes
    finally:
        handle.remove()
