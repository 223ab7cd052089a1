"""PGD with its settings, aimed at a network: the same adversary trains and evaluates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from advml import config
from advml.attacks.draws import Randomness
from advml.attacks.pgd import Objective, default_step_size, pgd
from advml.attacks.threat import ThreatModel
from advml.networks.models import Network, under_attack


@dataclass(frozen=True)
class Adversary:
    """Everything that defines an attack but its objective.

    Attributes:
        threat_model: ball and box.
        steps, step_size, random_start, keep: as in `pgd`.
        mode: of the network while it is attacked; "eval" leaves batch-norm statistics alone.
        momentum, schedule: as in `pgd`.
    """

    threat_model: ThreatModel
    steps: int
    step_size: float
    random_start: bool
    keep: Literal["last", "best"]
    mode: Literal["eval", "train"] = "eval"
    momentum: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def scaled(self, share: float) -> Adversary:
        """The same attack in a ball of `share` of the radius, with steps as much shorter."""
        if share == 1:
            return self
        threat_model = replace(self.threat_model, epsilon=share * self.threat_model.epsilon)
        return replace(self, threat_model=threat_model, step_size=share * self.step_size)

    def attack(self, network: Network, objective: Callable[[], Objective], images: Tensor, *, generator: Randomness) -> Tensor:
        """Adversarial images (N, C, H, W) for `network`; gradients, modes, statistics and global RNG stay as they are.

        Args:
            network: is frozen and in `mode` while it is attacked.
            objective: builds the objective; called once, under attack conditions, so that whatever stays
                constant over the steps (the clean embedding) is computed there, once.
            images: (N, C, H, W) in [0, 1].
            generator: draws the random start, on the CPU; for the batch, or `PerImage`.
        """
        with under_attack(network, mode=self.mode):
            start = self.threat_model.random_start(images, generator=generator) if self.random_start else None
            return pgd(
                objective(),
                images,
                threat_model=self.threat_model,
                steps=self.steps,
                step_size=self.step_size,
                start=start,
                keep=self.keep,
                momentum=self.momentum,
                schedule=self.schedule,
            )


def training_adversary(configuration: config.Config, phase: config.Phase | None = None) -> Adversary:
    """The attack inside adversarial training: the last iterate of a few steps. A phase may have its own radius and number of steps."""
    spec, threat = configuration.attack, configuration.threat_model
    epsilon, steps = threat.epsilon, spec.steps
    if phase is not None:
        epsilon, steps = phase.epsilon or epsilon, phase.attack_steps or steps
    return Adversary(
        threat_model=ThreatModel(threat.norm, epsilon),
        steps=steps,
        step_size=spec.step_size or default_step_size(epsilon, steps),
        random_start=spec.random_start,
        keep="last",
        mode=spec.batch_norm,
    )


def evaluation_adversary(configuration: config.Config, *, epsilon: float) -> Adversary:
    """The attack of `evaluate` at one epsilon."""
    spec = configuration.evaluate
    return Adversary(
        threat_model=ThreatModel(configuration.threat_model.norm, epsilon),
        steps=spec.steps,
        step_size=spec.step_size or default_step_size(epsilon, spec.steps),
        random_start=spec.random_start,
        keep=spec.keep,
        momentum=spec.momentum,
        schedule=spec.schedule,
    )
