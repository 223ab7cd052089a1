"""Trials of the search for the strongest attack, and the final measurement of its winner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from advml.attacks import autoattack as autoattacks
from advml.attacks.threat_model import ThreatModel
from advml.config import Config, changed
from advml.core.device import generator_for
from advml.core.paths import Workspace
from advml.data.datasets import Split
from advml.evaluation.attack_suite import CLEAN_IMAGES, AttackSpec, library_attack, threat_model_2
from advml.evaluation.intervals import wilson
from advml.evaluation.metrics import survivors
from advml.evaluation.run_attacks import Scorer, run_attacks
from advml.pipeline.context import Context
from advml.similarity.statistics import mcnemar
from advml.tuning import search as searches
from advml.tuning.attack_search import AttackSearch, passes
from advml.tuning.space import Values

# Name of the attack of `evaluate` that searches vary. With `evaluate.seed`, it determines the random numbers, so that the default attack on
# the same images gives the study's own figure.
STUDIED = "accuracy/threat_model_2"


def evaluation_attack(configuration: Config, *, half: bool = False) -> AttackSpec:
    """Threat model II of `evaluate`, PGD on an objective of the classifier; `half`: at half of epsilon, with the same random numbers."""
    chosen = threat_model_2(configuration.evaluate, configuration.threat_model, suffix="_half" if half else "")
    return replace(chosen, name=STUDIED, kept=False)


def interval(right: Tensor) -> dict[str, Any]:
    """Accuracy from a mask of correct images (n,), with its 95 % interval."""
    low, high = wilson(int(right.sum()), len(right))
    return {"accuracy": float(right.double().mean()), "low": low, "high": high, "n": len(right)}


class Bench(searches.Bench):
    """The model under attack, and the images on which attacks are compared.

    Attributes:
        validation: in shuffled order, so that batches are not sorted by class.
    """

    def __init__(self, search: AttackSearch) -> None:
        self.search, self.spec, self.config = search, search.spec, search.config
        self.context = Context(search.config, Workspace(search.root))
        _, self.network = self.context.load_network(search.folder)
        self.scorer = Scorer.of(self.network, self.context.machine)
        whole = self.context.dataset.validation
        order = torch.randperm(len(whole.labels), generator=generator_for("tune", self.spec.seed))[: self.spec.images]
        self.validation = Split(whole.images[order], whole.labels[order])

    def attack(self, values: Values) -> AttackSpec:
        """Attack of `evaluate` with these values."""
        return evaluation_attack(changed(self.config, self.search.proposal(values)))

    def default(self) -> AttackSpec:
        """Attack of `evaluate`, with as many steps as the budget allows if tune.attack.budget is set."""
        spec = self.config.evaluate
        return evaluation_attack(self.config) if self.spec.budget == spec.steps * spec.restarts else self.attack({})

    def under(self, attack: AttackSpec, split: Split) -> Iterator[Tensor]:
        """Yield, per batch, the mask (n,) of images that stay correct under every restart of the attack.

        Each image has the same random starts under all attacks: those of `evaluate`.
        """
        run = {"batch_size": self.spec.batch_size, "seed": self.config.evaluate.seed}
        for rows in torch.arange(len(split.labels)).split(self.spec.batch_size):
            some = Split(split.images[rows], split.labels[rows])
            yield run_attacks(self.network, self.scorer, some, [CLEAN_IMAGES, attack], **run)[attack.name].right

    def objective(self, attempt: searches.Attempt) -> Sequence[float]:
        """Accuracy on validation under the attack, reported after every batch for the pruner."""
        right = total = 0
        for number, batch in enumerate(self.under(self.attack(attempt.values), self.validation)):
            right, total = right + int(batch.sum()), total + len(batch)
            attempt.history.append({"epoch": number, "robust": right / total})
            attempt.report(number, float(batch.double().mean()))
        return (right / total,)

    def confirm(self, values: Values) -> dict[str, Any]:
        """Measure winner and default at the same budget, on validation and, once, on test."""
        attacks = {"default": self.default(), "winner": self.attack(values)}
        own = attacks["default"].settings == evaluation_attack(self.config).settings
        other = "" if own else f", with the {self.spec.budget} steps of tune.attack.budget in all"
        told: dict[str, Any] = {
            "budget": self.spec.budget,
            "epsilon": self.config.attacked_epsilon,
            "norm": self.config.threat_model.norm,
            "default_is": f"the attack of evaluate{other}",
            "passes": {"default": passes(**self.search.attack({})), "winner": passes(**self.search.attack(values))},
        }
        for name, split in (("validation", self.validation), ("test", self.context.dataset.test)):
            right = {who: torch.cat(list(self.under(attack, split))) for who, attack in {"clean": CLEAN_IMAGES, **attacks}.items()}
            paired = mcnemar(right["default"].numpy(), right["winner"].numpy())
            told[name] = {who: interval(found) for who, found in right.items()} | {"paired": paired}
        return told

    def autoattack(self) -> dict[str, Any]:
        """Measure the model under AutoAttack's standard set on test, as a reference for cheaper attacks; `not_run`: attacks left out."""
        spec, split, classes = self.config.evaluate, self.context.dataset.test, len(self.context.dataset.classes)
        threat_model = ThreatModel(self.config.threat_model.norm, self.config.attacked_epsilon)
        left_out = autoattacks.not_run(autoattacks.ATTACKS, classes)
        attacks = [
            replace(library_attack(name, threat_model, classes=classes, strength=autoattacks.Strength()), left_only=True)
            for name in autoattacks.ATTACKS
            if name not in left_out
        ]
        run = {"batch_size": spec.batch_size, "seed": spec.seed}
        found = {"test": interval(survivors(run_attacks(self.network, self.scorer, split, [CLEAN_IMAGES, *attacks], **run)))}
        return found | ({"not_run": left_out} if left_out else {})
