"""What `evaluate` measures, in this order: a list of figures, each with its attack.

`accuracy/threat_model_1`: PGD on the contrastive objective of encoder and projection head, then classify.
`accuracy/threat_model_2`: PGD end to end on an objective of the classifier, by default cross-entropy.
Each at `evaluate.epsilon` (by default that of training) and, under the suffix `_half`, at half of it.
Then the cascade: attacks from cheap to expensive, each aimed at what all before it have left standing. An image counts for
`accuracy/worst_case` only if it survives every attack of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from advml import config
from advml.attacks import autoattack
from advml.attacks.adversary import Adversary, evaluation_adversary
from advml.attacks.draws import PerImage
from advml.attacks.pgd import Objective
from advml.attacks.threat import ThreatModel
from advml.networks.models import Network
from advml.recipes import Scheme
from advml.training.tasks import classification_objective, contrastive_objective

# (network, images, labels, draws) -> adversarial images
Craft = Callable[[nn.Module, Tensor, Tensor, PerImage], Tensor]
# (network, images, labels) -> objective; built anew for every batch of images.
MakeObjective = Callable[[Network, Tensor, Tensor], Objective]


@dataclass(frozen=True)
class Figure:
    """One attack of an evaluation, and how its outcome is counted. `craft=None`: the clean images.

    Attributes:
        name: of the metric, or under `worst_case/` of a step of the cascade.
        again: what repetitions do; None: the same. An attack that begins at the image begins at random then, or it would repeat itself.
        settings: of the attack, for the record.
        restarts: the attack is repeated on what it has left over.
        coupled: the objective couples the batch: images must not leave it.
        kept: its adversarial images are stored, for `represent` and `compare`.
        left_only: aimed at the images that no figure before has broken; else at all.
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


def plan(configuration: config.Config, scheme: Scheme | None, *, classes: int, note: str = "") -> list[Figure]:
    """Everything that is measured on a model.

    Args:
        scheme: without one, or with one without a projection head (SL), there is no threat model I.
        note: on the projection head, for the record.
    """
    return [*figures(configuration, scheme, note=note), *cascade(configuration, classes=classes)]


def figures(configuration: config.Config, scheme: Scheme | None, *, note: str = "") -> list[Figure]:
    """Clean accuracy and the threat models, each on all images."""
    listed = [Figure("accuracy/clean")]
    for suffix, share in (("", 1.0), ("_half", 0.5)):
        adversary = evaluation_adversary(configuration, epsilon=share * configuration.attacked_epsilon)
        restarts = configuration.evaluate.restarts
        if scheme and scheme.groups:
            make = _contrastive(scheme.groups, configuration.temperature)
            figure = pgd_figure(f"accuracy/threat_model_1{suffix}", adversary, make, loss="contrastive", note=note)
            listed.append(replace(figure, restarts=restarts, coupled=True))
        loss = configuration.evaluate.objective
        figure = pgd_figure(f"accuracy/threat_model_2{suffix}", adversary, classification(loss), loss=LOSSES.get(loss, loss))
        listed.append(replace(figure, restarts=restarts, kept=share == 1))
    return listed


def cascade(configuration: config.Config, *, classes: int) -> list[Figure]:
    """The attacks of `worst_case.attacks` that exist for so many classes, each on what is left; without any there is no cascade.

    PGD on cross-entropy and on the margin are always among the attacks: what neither threat model II nor the list has comes first.
    """
    asked, spec = configuration.worst_case.attacks, configuration.evaluate
    missing = [name for name, loss in OWN.items() if name not in asked and loss != spec.objective] if asked else []
    names = [*missing, *(name for name in asked if name in OWN or autoattack.applicable(name, classes))]
    return [replace(_step(configuration, name, classes), left_only=True) for name in names]


OWN = {"pgd-ce": "ce", "pgd-margin": "margin"}  # our own attacks of the cascade, and their objectives
LOSSES = {"ce": "cross-entropy"}  # names of objectives in records, where they differ


def _step(configuration: config.Config, name: str, classes: int) -> Figure:
    spec = configuration.worst_case
    adversary = evaluation_adversary(configuration, epsilon=configuration.attacked_epsilon)
    if name in OWN:
        make, loss = classification(OWN[name]), LOSSES.get(OWN[name], OWN[name])
        figure = pgd_figure(f"worst_case/{name}", replace(adversary, random_start=True), make, loss=loss)
        return replace(figure, restarts=spec.restarts)
    strength = autoattack.Strength(steps=spec.steps, targets=spec.targets, queries=spec.queries)
    return autoattack_figure(name, adversary.threat_model, classes=classes, strength=strength)


def autoattack_figure(name: str, threat_model: ThreatModel, *, classes: int, strength: autoattack.Strength) -> Figure:
    """A figure of one of AutoAttack's attacks."""

    def craft(network: nn.Module, images: Tensor, labels: Tensor, draws: PerImage) -> Tensor:
        return autoattack.attack(
            name,
            network,
            images,
            labels,
            threat_model=threat_model,
            classes=classes,
            strength=strength,
            seed=draws.seed % 2**31,
        )

    settings = {"attack": name, "library": "pyautoattack", **threat_of(threat_model), **asdict(strength)}
    return Figure(f"worst_case/{name}", craft, threat_model=threat_model, settings=settings)


def pgd_figure(name: str, adversary: Adversary, make: MakeObjective, *, loss: str, note: str = "") -> Figure:
    """A figure of our own PGD."""

    def crafting(adversary: Adversary) -> Craft:
        return lambda network, images, labels, draws: adversary.attack(
            network, lambda: make(network, images, labels), images, generator=draws
        )

    attack = asdict(adversary)
    del attack["threat_model"]
    settings = {"attack": "pgd", "objective": loss, **threat_of(adversary.threat_model), **attack}
    again = crafting(replace(adversary, random_start=True))
    return Figure(name, crafting(adversary), again, adversary.threat_model, settings | ({"note": note} if note else {}))


def threat_of(threat_model: ThreatModel) -> dict[str, Any]:
    """The ball and the box, for the record."""
    return {**asdict(threat_model), "box": [0, 1]}


def classification(loss: str) -> MakeObjective:
    """An objective of the classifier by name: ce, margin, dlr."""
    return lambda network, images, labels: classification_objective(network, labels, loss)


def _contrastive(groups: Callable[[Tensor], Tensor], temperature: float) -> MakeObjective:
    return lambda network, images, labels: contrastive_objective(network, images, groups(labels), temperature=temperature)
