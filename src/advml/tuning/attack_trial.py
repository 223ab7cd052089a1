"""The search for the strongest attack within a budget: what a trial does, and how its winner is measured once more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advml.attacks import autoattack as autoattacks
from advml.attacks.threat_model import ThreatModel
from advml.config import Config, changed
from advml.core.device import Machine, generator_for
from advml.core.paths import Workspace
from advml.data.datasets import Split
from advml.evaluation.attack_suite import CLEAN_IMAGES, AttackSpec, library_attack, threat_model_2
from advml.evaluation.run_attacks import Scorer, run_attacks
from advml.models.network import Network
from advml.pipeline.context import Context
from advml.similarity.statistics import mcnemar
from advml.tuning.comparison import interval
from advml.tuning.space import Values
from advml.tuning.trial import Attempt, Objective

if TYPE_CHECKING:
    from advml.tuning.attack_search import AttackSearch

# The attack of `evaluate` that searches measure. Random numbers follow from its name and `evaluate.seed`, so the same attack on the same
# images gives the study's own figure.
STUDIED = "accuracy/threat_model_2"


def evaluation_attack(configuration: Config, *, half: bool = False) -> AttackSpec:
    """Threat model II of `evaluate`, PGD on an objective of the classifier; at half of its radius with the same random numbers."""
    chosen = threat_model_2(configuration.evaluate, configuration.threat_model, suffix="_half" if half else "")
    return replace(chosen, name=STUDIED, kept=False)


def withstood(
    network: Network, split: Split, attack: AttackSpec | None, machine: Machine, *, batch_size: int, seed: int
) -> Iterator[Tensor]:
    """Batch by batch, which images (n,) stay right: clean (`attack=None`), or under every restart of the attack.

    An image has the same random starts whatever the attack: those of `evaluate`, where `seed` is `evaluate.seed`.
    """
    attacks = [CLEAN_IMAGES, *([attack] if attack else [])]
    scorer = Scorer.of(network, machine)
    for rows in torch.arange(len(split.labels)).split(batch_size):
        some = Split(split.images[rows], split.labels[rows])
        yield run_attacks(network, scorer, some, attacks, batch_size=batch_size, seed=seed)[attacks[-1].name].right


class Subject:
    """The model under attack and everything that stays the same over all trials."""

    def __init__(self, search: AttackSearch) -> None:
        self.search, self.spec = search, search.spec
        self.context = Context(search.config, Workspace(search.root))
        _, self.network = self.context.load_network(search.folder)

    def attack(self, values: Values) -> AttackSpec:
        """The attack of `evaluate` under what these values mean in params.yaml."""
        return evaluation_attack(changed(self.search.config, self.search.proposal(values)))

    def default(self) -> AttackSpec:
        """The attack of `evaluate`; where the budget is another, with as many steps as that allows."""
        spec = self.search.config.evaluate
        return evaluation_attack(self.search.config) if self.search.budget == spec.steps * spec.restarts else self.attack({})

    def under(self, attack: AttackSpec | None, split: Split) -> Iterator[Tensor]:
        """See `withstood`."""
        run = {"batch_size": self.spec.batch_size, "seed": self.search.config.evaluate.seed}
        return withstood(self.network, split, attack, self.context.machine, **run)

    def validation(self) -> Split:
        """The validation images of the search, shuffled: classes must not come one after another."""
        split = self.context.dataset.validation
        order = torch.randperm(len(split.labels), generator=generator_for("tune", self.spec.seed))[: self.spec.images]
        return Split(split.images[order], split.labels[order])


def objective(search: AttackSearch) -> Objective:
    """The trial: accuracy on validation under the attack, reported after every batch; the pruner compares batch by batch."""
    subject = Subject(search)
    split = subject.validation()

    def run(attempt: Attempt) -> Sequence[float]:
        right = total = 0
        for number, batch in enumerate(subject.under(subject.attack(attempt.values), split)):
            right, total = right + int(batch.sum()), total + len(batch)
            attempt.history.append({"epoch": number, "robust": right / total})
            attempt.report(number, float(batch.double().mean()))
        return (right / total,)

    return run


def confirm(search: AttackSearch, values: Values) -> dict[str, Any]:
    """Winner and default at the same budget, on validation and, once, on test."""
    subject = Subject(search)
    attacks = {"default": subject.default(), "winner": subject.attack(values)}
    own = attacks["default"].settings == evaluation_attack(search.config).settings
    other = "" if own else f", with the {search.budget} steps of tune.attack.budget in all"
    told: dict[str, Any] = {
        "budget": search.budget,
        "epsilon": search.config.attacked_epsilon,
        "norm": search.config.threat_model.norm,
        "default_is": f"the attack of evaluate{other}",
        "passes": {"default": search.passes_of({}), "winner": search.passes_of(values)},
    }
    for name, split in (("validation", subject.validation()), ("test", subject.context.dataset.test)):
        right = {who: torch.cat(list(subject.under(attack, split))).numpy() for who, attack in {"clean": None, **attacks}.items()}
        told[name] = {who: interval(found) for who, found in right.items()} | {"paired": mcnemar(right["default"], right["winner"])}
    return told


def autoattack(search: AttackSearch) -> dict[str, Any]:
    """The model under the whole of AutoAttack's standard set on test, which is what all cheaper attacks are to be compared with."""
    subject, spec = Subject(search), search.config.evaluate
    split, classes = subject.context.dataset.test, len(subject.context.dataset.classes)
    threat_model = ThreatModel(search.config.threat_model.norm, search.config.attacked_epsilon)
    attacks = [
        replace(library_attack(name, threat_model, classes=classes, strength=autoattacks.Strength()), left_only=True)
        for name in autoattacks.ATTACKS
        if autoattacks.applicable(name, classes)
    ]
    right = torch.ones(len(split.labels), dtype=torch.bool)
    scorer, run = Scorer.of(subject.network, subject.context.machine), {"batch_size": spec.batch_size, "seed": spec.seed}
    for outcome in run_attacks(subject.network, scorer, split, [CLEAN_IMAGES, *attacks], **run).values():
        right[outcome.rows] &= outcome.right
    return {"test": interval(right.numpy())}
