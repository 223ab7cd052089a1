"""The contract between a search, its trials and the driver: what is searched, how trials are chosen and stopped, what a trial reports."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import optuna

from advml.engine import process_task
from advml.errors import UserError
from advml.paths import Workspace
from advml.tuning.space import Distributions, Values

Record = dict[str, float]
REDUCTION = 3  # of Hyperband: the share of trials that goes on from rung to rung is its inverse


@dataclass(frozen=True)
class Definition:
    """A study as the database knows it.

    Attributes:
        name: in the database, in paths and in MLflow, e.g. `attack-SL-AT-s0`.
        directions: "minimize" or "maximize", one per objective.
        distributions: of every key.
        default: the values to start with and to beat; None if the space does not contain them.
        fingerprint: of space, configuration, data and weights; a study of other ones is another study.
        sampler: made anew for each trial, from a seed.
    """

    name: str
    directions: tuple[str, ...]
    distributions: Distributions
    default: Values | None
    fingerprint: str
    pruner: Callable[[], optuna.pruners.BasePruner]
    sampler: Callable[[int], optuna.samplers.BaseSampler]


class Search(Protocol):
    """What is searched. Picklable: it is sent to the processes that run its trials."""

    name: str
    metrics: tuple[str, ...]  # names of the objectives, e.g. ("robust",)
    once: tuple[str, ...]  # what best.yaml tells of the study whichever trial wins, e.g. ("autoattack",)

    def definition(self) -> Definition: ...
    def open(self) -> Callable[[Attempt], Sequence[float]]: ...  # the costly part: data, networks; then one call per trial
    def tags(self) -> dict[str, Any]: ...  # of the MLflow run
    def parameters(self) -> dict[str, Any]: ...  # of the MLflow run: space and budget
    def proposal(self, values: Values) -> dict[str, Any]: ...  # values -> keys of params.yaml
    def confirm(self, values: Values) -> dict[str, Any]: ...  # measures the winner once more, for best.yaml
    def measure(self, name: str) -> dict[str, Any]: ...  # one of `once`


@dataclass(frozen=True)
class Report:
    """How a trial does at a step: the value that the pruner compares, and what people are to read in its place."""

    step: int
    value: float
    measured: Mapping[str, float] | None = None


@dataclass
class Attempt:
    """A trial at work, as its search sees it.

    Attributes:
        values: what the trial tries.
        scratch: a folder that a retry of this trial finds again.
        ask: gives the driver a report and returns whether to stop.
        history: a record per epoch or batch.
        measured: figures beside the objectives.
        constraints: by how much each is violated; at most 0: it is kept.
    """

    values: Values
    scratch: Path
    ask: Callable[[Report], bool] = process_task.ask
    history: list[Record] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    constraints: dict[str, float] = field(default_factory=dict)

    def report(self, step: int, value: float, measured: Mapping[str, float] | None = None) -> None:
        """Report how it does. Raises optuna.TrialPruned if that is not well enough to go on."""
        if self.ask(Report(step, value, measured)):
            raise optuna.TrialPruned


@dataclass(frozen=True)
class Hyperband:
    """Makes a Hyperband pruner whose resource is the epoch (Li et al. 2018)."""

    epochs: int

    def __call__(self) -> optuna.pruners.BasePruner:
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=self.epochs, reduction_factor=REDUCTION)

    @staticmethod
    def rungs(epochs: int) -> tuple[int, ...]:
        """The epochs 1, 3, 9, ... below `epochs` at which it compares trials; at least the first."""
        return tuple(REDUCTION**n for n in range(epochs) if n == 0 or REDUCTION**n < epochs)


def tpe(seed: int) -> optuna.samplers.BaseSampler:
    """TPE, multivariate, which takes trials at work for bad ones (constant liar) and constraints into account."""
    return optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=8)


def wilcoxon() -> optuna.pruners.BasePruner:
    """Stops a trial that the best one beats batch by batch, by the signed-rank test at p < 0.1 (Wilcoxon 1945)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner()


def digest_of(file: Path, *, remedy: str) -> str:
    """The digest in a model.json or dataset.json, read without torch. Raises UserError with the remedy."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{file} is missing or damaged; {remedy}") from None


def data_digest(root: Path) -> str:
    """The digest of the prepared images."""
    return digest_of(Workspace(root).prepared / "dataset.json", remedy="make the data with: advml prepare")
