"""Trials of the search for better training, and the comparison of its winner with the default on further seeds.

A trial trains like the stage of that name, with other values. All trials are measured by the same attack on validation, that of `evaluate`
at the study's epsilon (half of it for standard pretraining): `robust`; `clean` must not be below the floor.

A killed trial resumes from its last epoch: checkpoint and measurements are in its scratch folder.
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
NOTE = "the winner was chosen on these validation images, so its figures on them are too high; test images were not used for the choice"


class Bench(searches.Bench):
    """Parts shared by all trials: data, machine, the pretrained encoder, and the attack of the measurement."""

    def __init__(self, search: TrainingSearch) -> None:
        self.search, self.context = search, Context(search.config, Workspace(search.root))
        self.machine, self.dataset = self.context.machine, self.context.dataset
        # Standard pretrainings have almost no robust accuracy at the full epsilon; at half of it, better and worse ones differ.
        self.attack = evaluation_attack(search.config, half=search.which == "st")
        self.pretrained = None
        if search.kind == "finetune":
            _, self.pretrained = load_pretrained(self.context, scheme=search.scheme, regime=search.which, seed=search.seed)

    def plan(self, configuration: Config, *, seed: int) -> Plan:
        """Plan of the searched phase with this configuration, on a new network."""
        search = self.search
        if self.pretrained is None:
            return plans.pretraining(configuration, self.dataset, scheme=search.scheme, phase=search.which, seed=seed)
        start, names = copy.deepcopy(self.pretrained), {"scheme": search.scheme, "regime": search.which, "seed": seed}
        return plans.finetuning(configuration, self.dataset, self.machine, start, **names)

    def train(self, configuration: Config, attempt: searches.Attempt, *, seed: int, watched: bool = True) -> Network:
        """Train, resuming a killed attempt; its earlier reports are repeated without new measurements.

        Args:
            watched: whether to report at Hyperband's rungs.
        """
        search, plan = self.search, self.plan(configuration, seed=seed)
        fingerprint = digest(attempt.values, search.fingerprint(), seed)
        watched_epochs = searches.rungs(plan.epochs) if watched and not search.pareto else ()
        known = Memo(attempt.scratch / f"rungs-{fingerprint}")  # a resumed trial lacks the weights of earlier epochs

        def on_epoch(record: Record) -> None:
            epoch = int(record["epoch"])
            attempt.history.append(dict(record))
            if epoch in watched_epochs:
                measured = known.json(str(epoch), lambda: self.validate(plan.network))
                attempt.history[-1] |= {f"validation/{name}": value for name, value in measured.items()}
                attempt.report(epoch, standing(measured, floor=search.spec.clean_floor), measured)

        checkpoint = Checkpoint(attempt.scratch / "state", fingerprint)
        return fit(plan, self.machine, checkpoint=checkpoint, on_epoch=on_epoch)[0]

    def measure(self, network: Network, *splits: Split) -> list[Measured]:
        """Clean and robust accuracy on each split; an encoder without classifier first gets a linear one, trained on clean images."""
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
        """Measurements on validation, by which trials are compared."""
        return self.measure(network, self.dataset.validation)[0]

    def _with_head(self, network: Network) -> Network:
        """Network with a linear head, trained on clean images with the encoder fixed."""
        search = self.search
        rows = (row for row in REGIMES.values() if row.pretraining == search.which and not row.attacked and not row.encoder_learns)
        start, names = copy.deepcopy(network), {"scheme": search.scheme, "regime": next(rows).name, "seed": search.seed}
        plan = plans.finetuning(search.config, self.dataset, self.machine, start, **names)
        with tempfile.TemporaryDirectory() as folder:  # fast, so no checkpoint is kept
            return fit(plan, self.machine, checkpoint=Checkpoint(Path(folder), ""))[0]

    def objective(self, attempt: searches.Attempt) -> Sequence[float]:
        """Train, with measurements and reports at Hyperband's rungs, and measure the selected weights."""
        search = self.search
        measured = self.validate(self.train(search.accept(attempt.values), attempt, seed=search.seed))
        attempt.measured["clean"] = measured["clean"]
        if not search.pareto:
            attempt.constraints["clean_floor"] = search.spec.clean_floor - measured["clean"]
        return [measured[name] for name in search.metrics]

    def confirm(self, values: Values) -> dict[str, Any]:
        """Train default and winner on further seeds, from the same pretrained encoder, and test whether they differ by more than noise."""
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
    """Value for the pruner, by the feasibility rule (Deb 2000): robust accuracy if the floor is reached, else clean - floor - 1.

    By robust accuracy alone, trials below the floor, which can never win, could prune feasible ones.
    """
    return measured["robust"] if measured["clean"] >= floor else measured["clean"] - floor - 1


def compare(scores: Mapping[str, Mapping[str, Sequence[Measured]]], *, floor: float | None) -> dict[str, Any]:
    """Compare default and winner over seeds, per split: their figures, paired differences, and `beats_default`.

    `beats_default` is true if the whole 95 % interval of the difference in robust accuracy is above 0; None with one seed.

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
    """Values and mean over seeds; with two or more also standard deviation and 95 % interval of the mean, for the given images.

    mean -+ t sd / sqrt(S), with the quantile t of Student's distribution of S - 1 degrees of freedom (Student 1908).
    """
    found = {"values": list(values), "mean": statistics.mean(values)}
    if len(values) < 2:
        return found
    sd = statistics.stdev(values)
    half = float(student.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return found | {"sd": sd, "low": found["mean"] - half, "high": found["mean"] + half}
