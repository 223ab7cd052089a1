"""Attacks of an evaluation, as a list of `AttackSpec`, in this order:

`accuracy/threat_model_1`: PGD on the contrastive objective of encoder and projection head; the result is then classified.
`accuracy/threat_model_2`: PGD end to end on an objective of the classifier, by default cross-entropy.
Each at `evaluate.epsilon` (by default that of training) and, with the suffix `_half`, at half of it.
Then the cascade: attacks from cheap to expensive, each on the images that survive all earlier ones. An image counts for
`accuracy/worst_case` only if it survives every attack of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from advml import config
from advml.attacks import autoattack
from advml.attacks.per_image_rng import PerImageGenerator
from advml.attacks.pgd import Adversary, Objective, evaluation_adversary
from advml.attacks.threat_model import ThreatModel
from advml.models.network import Network
from advml.recipes import Scheme
from advml.training.tasks import classification_objective, contrastive_objective

# (network, images, labels, random numbers) -> adversarial images
Craft = Callable[[nn.Module, Tensor, Tensor, PerImageGenerator], Tensor]
# (network, images, labels) -> objective; called for every batch of images.
MakeObjective = Callable[[Network, Tensor, Tensor], Objective]

SHARES = {"": 1.0, "_half": 0.5}  # suffix of a threat model's metric -> share of epsilon
PGD_LOSSES = {"pgd-ce": "ce", "pgd-margin": "margin"}  # PGD attacks of the cascade -> their objectives
RECORDED = {"ce": "cross-entropy"}  # objective -> its name in records, if that differs


@dataclass(frozen=True)
class AttackSpec:
    """One attack of an evaluation, with its settings. `craft=None`: clean images.

    Attributes:
        name: of the metric; for a step of the cascade `worst_case/...`. Also seeds its random numbers.
        again: variant of `craft` for restarts; None: `craft`. An attack without a random start gets one, since it would repeat itself.
        settings: of the attack, for the record.
        restarts: number of runs, each on the images that survive the earlier ones.
        coupled: whether the objective couples the images of a batch, so that broken ones must stay in it.
        kept: whether its adversarial images are stored, for `represent` and `compare`.
        left_only: attack only images that survive all earlier attacks; else all images.
    """

    name: str
    craft: Craft | None = None
    again: Craft | None = None
    threat_model: ThreatModel | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    restarts: int = 1
    coupled: bool = False
    kept: bool = False
    left_only: bool = False


CLEAN_IMAGES = AttackSpec("accuracy/clean")


def attack_suite(
    spec: config.EvaluationAttack,
    threat: config.ThreatModelSection,
    worst_case: config.WorstCase,
    scheme: Scheme | None,
    *,
    temperature: float,
    classes: int,
    note: str = "",
) -> list[AttackSpec]:
    """List of the attacks on a model: clean images and threat models, each on all images, then the cascade.

    Args:
        scheme: of the model; threat model I is left out for None, and for schemes without projection head (SL).
        temperature: of the contrastive objective.
        classes: number of classes.
        note: remark on the projection head, for the record.
    """
    attacks = [CLEAN_IMAGES]
    for suffix in SHARES:
        if scheme and scheme.groups:
            attacks.append(threat_model_1(spec, threat, scheme, suffix=suffix, temperature=temperature, note=note))
        attacks.append(threat_model_2(spec, threat, suffix=suffix))
    return [*attacks, *cascade(spec, threat, worst_case, classes=classes)]


def threat_model_1(
    spec: config.EvaluationAttack,
    threat: config.ThreatModelSection,
    scheme: Scheme,
    *,
    suffix: str = "",
    temperature: float,
    note: str = "",
) -> AttackSpec:
    """Threat model I: PGD that maximises the scheme's loss between the embeddings of an image and its adversarial example."""

    def make(network: Network, images: Tensor, labels: Tensor) -> Objective:
        return contrastive_objective(network, images, scheme.groups(labels), temperature=temperature, loss=scheme.loss)

    adversary = evaluation_adversary(spec, threat, share=SHARES[suffix])
    attack = pgd_attack(f"accuracy/threat_model_1{suffix}", adversary, make, loss=scheme.loss, note=note)
    return replace(attack, restarts=spec.restarts, coupled=True)


def threat_model_2(spec: config.EvaluationAttack, threat: config.ThreatModelSection, *, suffix: str = "") -> AttackSpec:
    """Threat model II: PGD end to end on an objective of the classifier."""
    adversary, loss = evaluation_adversary(spec, threat, share=SHARES[suffix]), RECORDED.get(spec.objective, spec.objective)
    attack = pgd_attack(f"accuracy/threat_model_2{suffix}", adversary, classification(spec.objective), loss=loss)
    return replace(attack, restarts=spec.restarts, kept=not suffix)


def cascade(
    spec: config.EvaluationAttack, threat: config.ThreatModelSection, worst_case: config.WorstCase, *, classes: int
) -> list[AttackSpec]:
    """Attacks of `worst_case.attacks` that exist for this number of classes, each on the images that are left; empty if there are none.

    An evaluation always includes PGD on cross-entropy and on the margin: those missing in threat model II and the list are put first.
    """
    asked, adversary = worst_case.attacks, evaluation_adversary(spec, threat)
    targets = min(worst_case.targets, classes - 1)
    strength = autoattack.Strength(steps=worst_case.steps, targets=targets, queries=worst_case.queries)

    def attack(name: str) -> AttackSpec:
        if name not in PGD_LOSSES:
            return library_attack(name, adversary.threat_model, classes=classes, strength=strength)
        loss = PGD_LOSSES[name]
        make, at_random = classification(loss), replace(adversary, random_start=True)
        return replace(pgd_attack(f"worst_case/{name}", at_random, make, loss=RECORDED.get(loss, loss)), restarts=worst_case.restarts)

    missing = [name for name, loss in PGD_LOSSES.items() if name not in asked and loss != spec.objective] if asked else []
    left_out = autoattack.not_run(asked, classes)
    names = [*missing, *(name for name in asked if name not in left_out)]
    return [replace(attack(name), left_only=True) for name in names]


def library_attack(name: str, threat_model: ThreatModel, *, classes: int, strength: autoattack.Strength) -> AttackSpec:
    """One of AutoAttack's attacks."""

    def craft(network: nn.Module, images: Tensor, labels: Tensor, generator: PerImageGenerator) -> Tensor:
        seed = generator.seed % 2**31
        return autoattack.attack(name, network, images, labels, threat_model=threat_model, classes=classes, strength=strength, seed=seed)

    settings = {"attack": name, "library": "pyautoattack", **ball(threat_model), **asdict(strength)}
    return AttackSpec(f"worst_case/{name}", craft, threat_model=threat_model, settings=settings)


def pgd_attack(name: str, adversary: Adversary, make: MakeObjective, *, loss: str, note: str = "") -> AttackSpec:
    """PGD on the objective that `make` builds; `loss` is its name in the record."""

    def crafting(adversary: Adversary) -> Craft:
        return lambda network, images, labels, generator: adversary.attack(
            network, lambda: make(network, images, labels), images, generator=generator
        )

    attack = asdict(adversary)
    del attack["threat_model"]
    settings = {"attack": "pgd", "objective": loss, **ball(adversary.threat_model), **attack}
    again = crafting(replace(adversary, random_start=True))
    return AttackSpec(name, crafting(adversary), again, adversary.threat_model, settings | ({"note": note} if note else {}))


def ball(threat_model: ThreatModel) -> dict[str, Any]:
    """Ball and box of a threat model, for the record."""
    return {**asdict(threat_model), "box": [0, 1]}


def classification(loss: str) -> MakeObjective:
    """Builder of an objective of the classifier, by name: ce, margin, dlr."""
    return lambda network, images, labels: classification_objective(network, labels, loss)
