"""The search for the strongest attack within a budget: what a trial does, and how its winner is measured once more.

No attack takes more forward and backward passes of an image that nothing breaks than the default does: see `advml.tuning.budget`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from advml.attacks import autoattack
from advml.attacks.pgd import Adversary, evaluation_adversary
from advml.attacks.threat_model import ThreatModel
from advml.config import Config
from advml.data.datasets import Split
from advml.evaluation.attack_suite import AttackSpec, classification, library_attack, pgd_attack
from advml.evaluation.intervals import wilson
from advml.evaluation.run_attacks import Scorer, run_attacks
from advml.networks.models import Network
from advml.paths import Workspace
from advml.runtime.machine import Machine, generator_for
from advml.similarity import statistics
from advml.stages.context import Context
from advml.tuning.budget import passes
from advml.tuning.search import Attempt
from advml.tuning.space import Values

if TYPE_CHECKING:
    from advml.tuning.attack_search import AttackSearch


# The figure of `evaluate` that searches measure. Random numbers follow from its name and `evaluate.seed`, so the same attack on the same
# images gives the study's own figure.
STUDIED = "accuracy/threat_model_2"


@dataclass(frozen=True)
class Attack:
    """PGD on an objective of the classifier, repeated; an image counts as broken if any repetition breaks it.

    Without `random_start` the first run begins at the image itself; the others begin at random, or they would repeat it.
    """

    adversary: Adversary
    objective: str
    restarts: int

    @classmethod
    def of(cls, values: Values, *, steps: int, threat_model: ThreatModel) -> Attack:
        """The attack of a trial; step sizes count in epsilons."""
        adversary = Adversary(
            threat_model=threat_model,
            steps=steps,
            step_size=values["step_size"] * threat_model.epsilon,
            random_start=values["random_start"],
            keep=values["keep"],
            momentum=values["momentum"],
            schedule=values["schedule"],
        )
        return cls(adversary, values["objective"], values["restarts"])

    @property
    def passes(self) -> dict[str, int]:
        """Forward and backward passes of an image that nothing breaks."""
        return passes(steps=self.adversary.steps, restarts=self.restarts, keep=self.adversary.keep)

    def figure(self) -> AttackSpec:
        """The attack as `evaluate` measures it: broken images leave the next restart, and examples must lie in the ball."""
        figure = pgd_attack(STUDIED, self.adversary, classification(self.objective), loss=self.objective)
        return replace(figure, restarts=self.restarts)


def withstood(network: Network, split: Split, attack: Attack | None, *, batch_size: int, seed: int, machine: Machine) -> Iterator[Tensor]:
    """Batch by batch, which images (n,) stay right: clean (`attack=None`), or under every restart of the attack.

    An image has the same random starts whatever the attack: those of `evaluate`, as `seed` is `evaluate.seed`.
    """
    figures = [AttackSpec("clean"), *([attack.figure()] if attack else [])]
    scorer = Scorer.of(network, machine)
    for rows in torch.arange(len(split.labels)).split(batch_size):
        some = Split(split.images[rows], split.labels[rows])
        outcomes = run_attacks(network, scorer, some, figures, batch_size=batch_size, seed=seed)
        yield outcomes[figures[-1].name].right


def evaluation_attack(configuration: Config, *, share: float = 1.0) -> Attack:
    """The attack of `evaluate`, at a share of its radius: how searches for better training measure every trial."""
    adversary = evaluation_adversary(configuration.evaluate, configuration.threat_model, share=share)
    return Attack(adversary, configuration.evaluate.objective, configuration.evaluate.restarts)


# The search


class Subject:
    """The model under attack and everything that stays the same over all trials."""

    def __init__(self, search: AttackSearch) -> None:
        self.search, self.spec = search, search.config.tune.attack
        self.context = Context(search.config, Workspace(search.root))
        self.record, self.network = self.context.load_network(search.folder)
        self.threat_model = ThreatModel(search.config.threat_model.norm, search.config.attacked_epsilon)

    def attack(self, values: Values) -> Attack:
        return Attack.of(self.search.default() | values, steps=self.search.steps(values), threat_model=self.threat_model)

    def default(self) -> Attack:
        """The attack of `evaluate`; where the budget is another, with as many steps as that allows."""
        spec = self.search.config.evaluate
        same = self.search.budget == spec.steps * spec.restarts
        return evaluation_attack(self.search.config) if same else self.attack({})

    def under(self, attack: Attack | None, split: Split) -> Iterator[Tensor]:
        seed, size = self.search.config.evaluate.seed, self.spec.batch_size
        return withstood(self.network, split, attack, batch_size=size, seed=seed, machine=self.context.machine)

    def validation(self) -> Split:
        """The validation images of the search, shuffled: classes must not come one after another."""
        split = self.context.dataset.validation
        order = torch.randperm(len(split.labels), generator=generator_for("tune", self.spec.seed))[: self.spec.images]
        return Split(split.images[order], split.labels[order])


def objective(search: AttackSearch) -> Callable[[Attempt], Sequence[float]]:
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
    splits = {"validation": subject.validation(), "test": subject.context.dataset.test}
    told: dict[str, Any] = {"budget": search.budget, "epsilon": subject.threat_model.epsilon, "norm": subject.threat_model.norm}
    other = (
        "" if attacks["default"] == evaluation_attack(search.config) else f", with the {search.budget} steps of tune.attack.budget in all"
    )
    told["default_is"] = f"the attack of evaluate{other}"
    told["passes"] = {who: attack.passes for who, attack in attacks.items()}
    for name, split in splits.items():
        right = {who: torch.cat(list(subject.under(attack, split))) for who, attack in attacks.items()}
        told[name] = {"clean": interval(torch.cat(list(subject.under(None, split))))}
        told[name] |= {who: interval(found) for who, found in right.items()} | {"paired": paired(right["default"], right["winner"])}
    return told


def under_autoattack(search: AttackSearch) -> dict[str, Any]:
    """The model under the whole of AutoAttack on test, which is what all cheaper attacks are to be compared with."""
    subject = Subject(search)
    return {"test": interval(_autoattack(subject, subject.context.dataset.test))}


def interval(right: Tensor) -> dict[str, Any]:
    """Share of right images with its 95 % interval."""
    low, high = wilson(int(right.sum()), len(right))
    return {"accuracy": float(right.double().mean()), "low": low, "high": high, "n": len(right)}


def paired(default: Tensor, winner: Tensor) -> dict[str, Any]:
    """Two attacks on the same images: those that only one of them breaks, with the two-sided p of McNemar's exact test (McNemar 1947).

    `difference`, with the ends of its 95 % interval, is the accuracy under the winner minus that under the default, see `statistics.share`.

    Args:
        default, winner: (N,) bool, which images each attack leaves right.
    """
    winner_only, default_only = int((default & ~winner).sum()), int((~default & winner).sum())
    p = binomtest(default_only, default_only + winner_only).pvalue if default_only + winner_only else 1.0
    found = statistics.difference(statistics.share(winner.numpy()), statistics.share(default.numpy()))
    low, high = found.interval
    return {
        "broken_by_winner_only": winner_only,
        "broken_by_default_only": default_only,
        "p": float(p),
        **{"difference": found.value, "low": low, "high": high},
    }


def _autoattack(subject: Subject, split: Split) -> Tensor:
    """Which images (N,) the whole of AutoAttack's standard set leaves right."""
    classes, spec = len(subject.context.dataset.classes), subject.search.config.evaluate
    figures = [
        replace(library_attack(name, subject.threat_model, classes=classes, strength=autoattack.Strength()), left_only=True)
        for name in autoattack.ATTACKS
        if autoattack.applicable(name, classes)
    ]
    scorer, run = Scorer.of(subject.network, subject.context.machine), {"batch_size": spec.batch_size, "seed": spec.seed}
    right = torch.ones(len(split.labels), dtype=torch.bool)
    for outcome in run_attacks(subject.network, scorer, split, [AttackSpec("clean"), *figures], **run).values():
        right[outcome.rows] &= outcome.right
    return right
