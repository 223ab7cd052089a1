"""The search for better training: what a trial does, and how its winner is compared with the default on further seeds.

A trial trains as the stage of that name does, under other values. Whatever it trains with, it is measured by one and the same
attack, that of `evaluate` at the study's radius, on validation: `robust`; and `clean` must not fall below the floor.

A trial that was killed goes on from its last epoch: checkpoint and measurements lie in its scratch folder.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from advml.config import Config, digest
from advml.core.device import derived_seed
from advml.core.paths import Workspace
from advml.core.result_cache import Memo
from advml.data.datasets import Split
from advml.evaluation.attack_suite import CLEAN_IMAGES
from advml.evaluation.run_attacks import Scorer, run_attacks
from advml.models.network import Network
from advml.pipeline import plans
from advml.pipeline.context import Context
from advml.pipeline.stages.finetune import load_pretrained
from advml.recipes import REGIMES, SCHEMES
from advml.training.checkpoint import Checkpoint
from advml.training.trainer import Plan, Record, fit
from advml.tuning import search as searches
from advml.tuning.attack_trial import evaluation_attack
from advml.tuning.space import Values
from advml.tuning.training_search import TrainingSearch

Measured = dict[str, float]  # robust, clean
NOTE = "the winner was chosen on these validation images, which flatters it there; test images had no part in the choice"


class Bench(searches.Bench):
    """Everything that stays the same over all trials: data, machine, the pretrained encoder, and the attack that measures."""

    def __init__(self, search: TrainingSearch) -> None:
        self.search, self.context = search, Context(search.config, Workspace(search.root))
        self.machine, self.dataset = self.context.machine, self.context.dataset
        # A standard pretraining withstands next to nothing at the whole radius; at half of it, better and worse ones differ.
        self.attack = evaluation_attack(search.config, half=search.which == "st")
        self.pretrained = None
        if search.kind == "finetune":
            _, self.pretrained = load_pretrained(self.context, scheme=search.scheme, regime=search.which, seed=search.seed)

    def plan(self, configuration: Config, *, seed: int) -> Plan:
        """The phase under this configuration, on a network of its own."""
        search = self.search
        if self.pretrained is None:
            return plans.pretraining(configuration, self.dataset, scheme=search.scheme, phase=search.which, seed=seed)
        start, names = copy.deepcopy(self.pretrained), {"scheme": search.scheme, "regime": search.which, "seed": seed}
        return plans.finetuning(configuration, self.dataset, self.machine, start, **names)

    def train(self, configuration: Config, attempt: searches.Attempt, *, seed: int, watched: bool = True) -> Network:
        """Train from the start, or from where a killed attempt had got to; reports on the way are made again, not measured again.

        Args:
            watched: whether to report at Hyperband's rungs.
        """
        search, plan = self.search, self.plan(configuration, seed=seed)
        fingerprint = digest(attempt.values, search.fingerprint(), seed)
        watched_epochs = searches.rungs(plan.phase.epochs) if watched and not search.pareto else ()
        known = Memo(attempt.scratch / f"rungs-{fingerprint}")  # the weights of earlier epochs are gone when a killed trial goes on

        def on_epoch(record: Record) -> None:
            epoch = int(record["epoch"])
            attempt.history.append(dict(record))
            if epoch in watched_epochs:
                measured = known.json(str(epoch), lambda: self.validate(plan.network))
                attempt.history[-1] |= {f"validation/{name}": value for name, value in measured.items()}
                attempt.report(epoch, standing(measured, floor=search.spec.clean_floor), measured)

        checkpoint = Checkpoint(attempt.scratch / "state", fingerprint)
        return fit(plan, self.dataset, self.machine, checkpoint=checkpoint, on_epoch=on_epoch)[0]

    def measure(self, network: Network, *splits: Split) -> list[Measured]:
        """Clean and robust accuracy on each split; an encoder without a classifier first gets a linear one, on clean images."""
        spec = self.search.config.evaluate
        if self.search.kind == "pretrain" and SCHEMES[self.search.scheme].head != "classifier":
            network = self._with_head(network)

        scorer, run = Scorer.of(network, self.machine), {"batch_size": spec.batch_size, "seed": spec.seed}
        found = []
        for split in splits:
            outcomes = run_attacks(network, scorer, split, [CLEAN_IMAGES, self.attack], **run)
            right = {"robust": outcomes[self.attack.name].right, "clean": outcomes[CLEAN_IMAGES.name].right}
            found.append({name: float(mask.double().mean()) for name, mask in right.items()})
        return found

    def validate(self, network: Network) -> Measured:
        """What decides between trials."""
        return self.measure(network, self.dataset.validation)[0]

    def _with_head(self, network: Network) -> Network:
        """The encoder under the regime that fine-tunes nothing but a head on clean images."""
        search = self.search
        rows = (row for row in REGIMES.values() if row.pretraining == search.which and not row.attacked and not row.encoder_learns)
        start, names = copy.deepcopy(network), {"scheme": search.scheme, "regime": next(rows).name, "seed": search.seed}
        plan = plans.finetuning(search.config, self.dataset, self.machine, start, **names)
        with tempfile.TemporaryDirectory() as folder:  # it takes a moment: nothing need be kept
            return fit(plan, self.dataset, self.machine, checkpoint=Checkpoint(Path(folder), ""))[0]

    def objective(self, attempt: searches.Attempt) -> Sequence[float]:
        """Train, measured and reported at Hyperband's rungs; then measure what training has selected."""
        search = self.search
        measured = self.validate(self.train(search.accept(attempt.values), attempt, seed=search.seed))
        attempt.measured["clean"] = measured["clean"]
        if not search.pareto:
            attempt.constraints["clean_floor"] = search.spec.clean_floor - measured["clean"]
        return [measured[name] for name in search.metrics]

    def confirm(self, values: Values) -> dict[str, Any]:
        """Default and winner trained on further seeds, on the same pretrained encoder: is the difference more than noise?"""
        search, splits = self.search, {"validation": self.dataset.validation, "test": self.dataset.test}
        if not search.further_seeds:
            return {}
        scores: dict[str, dict[str, list[Measured]]] = {name: {"default": [], "winner": []} for name in splits}
        for number in range(1, search.further_seeds + 1):
            seed = derived_seed("tune", search.seed, number)
            for who, chosen in (("default", {}), ("winner", values)):
                scratch = Workspace(search.root).scratch(f"tune/{search.name}/confirm-{who}-{number}")
                network = self.train(search.accept(chosen), searches.Attempt(chosen, scratch), seed=seed, watched=False)
                for name, measured in zip(splits, self.measure(network, *splits.values()), strict=True):
                    scores[name][who].append(measured)
        return {"confirmed": compare(scores, floor=None if search.pareto else search.spec.clean_floor)}


def standing(measured: Measured, *, floor: float) -> float:
    """What the pruner compares, by the rule of feasibility (Deb 2000): those that keep the floor by how robust they are, and before all
    others; these by how far they are below it. By robustness alone, what can never win would prune what can.
    """
    return measured["robust"] if measured["clean"] >= floor else measured["clean"] - floor - 1


def compare(scores: Mapping[str, Mapping[str, Sequence[Measured]]], *, floor: float | None) -> dict[str, Any]:
    """Of each split default and winner over the seeds, their paired differences, and whether the winner is more robust by more than
    noise: whether the whole interval of the differences is above 0; None with one seed.

    Args:
        scores: split -> default, winner -> figures, seed by seed.
        floor: least clean validation accuracy; None: there is none.
    """
    told: dict[str, Any] = {"further_seeds": len(scores["validation"]["winner"]), "note": NOTE}
    for split, both in scores.items():
        pairs = list(zip(both["default"], both["winner"], strict=True))
        both = {**both, "difference": [{name: after[name] - before[name] for name in after} for before, after in pairs]}
        told[split] = {who: {name: over_seeds([one[name] for one in seeds]) for name in seeds[0]} for who, seeds in both.items()}
        low = told[split]["difference"]["robust"].get("low")
        told[split]["beats_default"] = None if low is None else low > 0
    if floor is not None:
        kept = [measured["clean"] >= floor for measured in scores["validation"]["winner"]]
        told["clean_floor"] = {"floor": floor, "kept": kept, "kept_on_every_seed": all(kept)}
    return told


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Values, mean, and from two on their standard deviation and the 95 % interval of the mean, over trainings on the images at hand.

    mean -+ t sd / sqrt(S), with the quantile t of Student's distribution of S - 1 degrees of freedom (Student 1908).
    """
    found = {"values": list(values), "mean": statistics.mean(values)}
    if len(values) < 2:
        return found
    sd = statistics.stdev(values)
    half = float(student.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return found | {"sd": sd, "low": found["mean"] - half, "high": found["mean"] + half}
