"""The search for better training: what a trial does, and how its winner is compared with the default on further seeds.

A trial trains as the stage of that name does, under other values. Whatever it trains with, it is measured by one and the same
attack, that of `evaluate` at the study's radius, on validation: `robust`; and `clean` must not fall below the floor.

A trial that was killed goes on from its last epoch: checkpoint and measurements lie in its scratch folder.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from advml.config import Config, digest
from advml.core.device import derived_seed
from advml.core.paths import Workspace
from advml.core.result_cache import Memo
from advml.data.datasets import Split
from advml.models.network import Network
from advml.pipeline import plans
from advml.pipeline.context import Context
from advml.pipeline.stages.finetune import load_pretrained
from advml.recipes import REGIMES, SCHEMES
from advml.training.checkpoint import Checkpoint
from advml.training.trainer import Plan, Record, fit
from advml.tuning.attack_trial import evaluation_attack, withstood
from advml.tuning.comparison import Measured, compare
from advml.tuning.search import rungs
from advml.tuning.space import Values
from advml.tuning.trial import Attempt, Objective

if TYPE_CHECKING:
    from advml.tuning.training_search import TrainingSearch


class Bench:
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
        return self._finetuning(configuration, self.pretrained, regime=search.which, seed=seed)

    def _finetuning(self, configuration: Config, network: Network, *, regime: str, seed: int) -> Plan:
        names = {"scheme": self.search.scheme, "regime": regime, "seed": seed}
        return plans.finetuning(configuration, self.dataset, self.machine, copy.deepcopy(network), **names)

    def measure(self, network: Network, *splits: Split) -> list[Measured]:
        """Clean and robust accuracy on each split; an encoder without a classifier first gets a linear one, on clean images."""
        spec = self.search.config.evaluate
        if self.search.kind == "pretrain" and SCHEMES[self.search.scheme].head != "classifier":
            network = self._with_head(network)
        found = []
        for split in splits:
            measured = {}
            for name, attack in (("robust", self.attack), ("clean", None)):
                right = withstood(network, split, attack, self.machine, batch_size=spec.batch_size, seed=spec.seed)
                measured[name] = float(torch.cat(list(right)).double().mean())
            found.append(measured)
        return found

    def validate(self, network: Network) -> Measured:
        """What decides between trials."""
        return self.measure(network, self.dataset.validation)[0]

    def _with_head(self, network: Network) -> Network:
        """The encoder under the regime that fine-tunes nothing but a head on clean images."""
        search = self.search
        rows = (row for row in REGIMES.values() if row.pretraining == search.which and not row.attacked and not row.encoder_learns)
        plan = self._finetuning(search.config, network, regime=next(rows).name, seed=search.seed)
        with tempfile.TemporaryDirectory() as folder:  # it takes a moment: nothing need be kept
            return fit(plan, self.dataset, self.machine, checkpoint=Checkpoint(Path(folder), ""))[0]


def objective(search: TrainingSearch) -> Objective:
    """The trial: train, measured and reported at Hyperband's rungs; then measure what training has selected."""
    bench = Bench(search)

    def run(attempt: Attempt) -> Sequence[float]:
        configuration = search.accept(attempt.values)
        measured = bench.validate(train(bench, configuration, attempt, seed=search.seed))
        attempt.measured["clean"] = measured["clean"]
        if search.pareto:
            return measured["robust"], measured["clean"]
        attempt.constraints["clean_floor"] = search.spec.clean_floor - measured["clean"]
        return (measured["robust"],)

    return run


def train(bench: Bench, configuration: Config, attempt: Attempt, *, seed: int, watched: bool = True) -> Network:
    """Train from the start, or from where a killed attempt had got to; reports on the way are made again, not measured again.

    Args:
        watched: whether anyone wants reports.
    """
    search, scratch = bench.search, attempt.scratch
    plan = bench.plan(configuration, seed=seed)
    fingerprint = digest(attempt.values, search.fingerprint(), seed)
    watched_epochs = rungs(plan.epochs) if watched and not search.pareto else ()
    known = Memo(scratch / f"rungs-{fingerprint}")  # the weights of earlier epochs are gone when a killed trial goes on

    def on_epoch(record: Record) -> None:
        epoch = int(record["epoch"])
        attempt.history.append(dict(record))
        if epoch in watched_epochs:
            measured = known.json(str(epoch), lambda: bench.validate(plan.network))
            attempt.history[-1] |= {f"validation/{name}": value for name, value in measured.items()}
            attempt.report(epoch, standing(measured, floor=search.spec.clean_floor), measured)

    return fit(plan, bench.dataset, bench.machine, checkpoint=Checkpoint(scratch / "state", fingerprint), on_epoch=on_epoch)[0]


def standing(measured: Measured, *, floor: float) -> float:
    """What the pruner compares, by the rule of feasibility (Deb 2000): those that keep the floor by how robust they are, and before all
    others; these by how far they are below it. By robustness alone, what can never win would prune what can.
    """
    return measured["robust"] if measured["clean"] >= floor else measured["clean"] - floor - 1


def confirm(search: TrainingSearch, values: Values) -> dict[str, Any]:
    """Default and winner trained on further seeds, on the same pretrained encoder: is the difference more than noise?"""
    if not search.spec.confirm:
        return {}
    bench = Bench(search)
    splits = {"validation": bench.dataset.validation, "test": bench.dataset.test}
    scores: dict[str, dict[str, list[Measured]]] = {name: {"default": [], "winner": []} for name in splits}
    for number in range(1, search.spec.confirm + 1):
        seed = derived_seed("tune", search.seed, number)
        for who, chosen in (("default", {}), ("winner", values)):
            scratch = Workspace(search.root).scratch(f"tune/{search.name}/confirm-{who}-{number}")
            network = train(bench, search.accept(chosen), Attempt(chosen, scratch), seed=seed, watched=False)
            for name, measured in zip(splits, bench.measure(network, *splits.values()), strict=True):
                scores[name][who].append(measured)
    return {"confirmed": compare(scores, floor=None if search.pareto else search.spec.clean_floor)}
