"""The contract between a search and its driver: what is searched, how trials are chosen and stopped, and what processes do for it."""

from __future__ import annotations

import importlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import optuna
from optuna.trial import TrialState

from advml.config import Config
from advml.core.errors import Failure
from advml.core.io import read_json
from advml.core.paths import Workspace
from advml.engine import process_task
from advml.tuning.space import Space, Values, distributions, holds

REDUCTION = 3  # of Hyperband: the share of trials that goes on from rung to rung is its inverse


@dataclass(frozen=True, kw_only=True)
class Search(ABC):
    """What is searched. Picklable: it is sent to the processes that run its trials.

    Attributes:
        root: the study's folder, from / on: processes run elsewhere.
        name: in the database, in paths and in MLflow, e.g. `attack-SL-AT-s0`.
        kind: its section of `tune`: attack, finetune or pretrain.
        work: the module that imports torch, with its `Bench`.
        metrics: names of the objectives.
        directions: "minimize" or "maximize", one per objective.
        once: measurements for best.yaml that do not depend on the winner, e.g. ("autoattack",).
        further_seeds: number of seeds on which winner and default are trained again and compared.
    """

    config: Config
    root: Path
    name: str
    kind: ClassVar[str]
    work: ClassVar[str]
    metrics = ("robust",)
    directions = ("maximize",)
    once = ()
    further_seeds = 0

    @abstractmethod
    def default(self) -> Values:
        """The values to start with and to beat: those of params.yaml."""

    @abstractmethod
    def proposal(self, values: Values) -> dict[str, Any]:
        """Values -> keys of params.yaml."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Of space, configuration, data and weights: a study of other ones is another study."""

    @abstractmethod
    def pruner(self) -> optuna.pruners.BasePruner:
        """Stops poor trials by their reports."""

    @abstractmethod
    def tags(self) -> dict[str, Any]:
        """Of the MLflow run."""

    @property
    def spec(self) -> Any:
        """The section `tune.<kind>`: space, budget, seed."""
        return getattr(self.config.tune, self.kind)

    @property
    def space(self) -> Space:
        """Ranges of the keys."""
        return self.spec.space

    def missed(self) -> Values:
        """The default's values that the space does not contain: the search does not start from it, then."""
        default = self.default()
        return {key: default[key] for key, spread in distributions(self.space).items() if not holds(spread, default[key])}

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """TPE, multivariate, which takes trials at work for bad ones (constant liar) and constraints into account."""
        return optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=8)

    def open(self) -> Bench:
        """Load data and networks, which is costly."""
        return importlib.import_module(self.work).Bench(self)


def hyperband(epochs: int) -> optuna.pruners.BasePruner:
    """A Hyperband pruner whose resource is the epoch (Li et al. 2018)."""
    return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=REDUCTION)


def rungs(epochs: int) -> tuple[int, ...]:
    """The epochs 1, 3, 9, ... below `epochs` at which Hyperband compares trials; at least the first."""
    return tuple(REDUCTION**n for n in range(epochs) if n == 0 or REDUCTION**n < epochs)


def digest_of(file: Path, *, remedy: str) -> str:
    """The digest in a model.json or dataset.json, read without torch. Raises UserError with the remedy."""
    return read_json(file, needs=("digest",), remedy=remedy)["digest"]


def data_digest(root: Path) -> str:
    """The digest of the prepared images."""
    return digest_of(Workspace(root).prepared / "dataset.json", remedy="make the data with: advml prepare")


# In the processes


@dataclass
class Attempt:
    """A trial at work, as its search sees it; then, sent back to the driver, how it has ended.

    Attributes:
        values: what the trial tries.
        scratch: a folder that a retry of this trial finds again.
        ask: gives the driver step, value and `measured` of a report; returns whether to stop.
        history: a record per epoch or batch.
        measured: figures beside the objectives.
        constraints: by how much each is violated; at most 0: it is kept.
        objectives: None unless it is complete.
        reason: why it has failed.
    """

    values: Values
    scratch: Path
    ask: Callable[[tuple[int, float, Mapping[str, float] | None]], bool] = process_task.ask
    history: list[dict[str, float]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    constraints: dict[str, float] = field(default_factory=dict)
    state: TrialState = TrialState.RUNNING
    objectives: list[float] | None = None
    reason: str | None = None
    seconds: float = 0.0

    def report(self, step: int, value: float, measured: Mapping[str, float] | None = None) -> None:
        """Report how it does: the value that the pruner compares, and what people are to read in its place.

        Raises:
            optuna.TrialPruned: it does not do well enough to go on.
        """
        if self.ask((step, value, measured)):
            raise optuna.TrialPruned

    def run(self, objective: Callable[[Attempt], Sequence[float]]) -> Attempt:
        """From start to end; whatever goes wrong is its result."""
        started = time.monotonic()
        try:
            objectives = [float(value) for value in objective(self)]
            if not all(map(math.isfinite, objectives)):
                raise Failure(f"its result is {objectives}")
            self.state, self.objectives = TrialState.COMPLETE, objectives
        except optuna.TrialPruned:
            self.state = TrialState.PRUNED
        except Exception as error:
            self.state, self.reason = TrialState.FAIL, process_task.described(error)
        self.seconds = time.monotonic() - started
        return self


class Bench(ABC):
    """A search with data and networks loaded, in a process that works for it. It has a method for each of `Search.once`, too."""

    @abstractmethod
    def objective(self, attempt: Attempt) -> Sequence[float]:
        """Run a trial; returns its objectives."""

    @abstractmethod
    def confirm(self, values: Values) -> dict[str, Any]:
        """Measure the winner once more, for best.yaml."""

    def trial(self, values: Values, scratch: Path) -> Attempt:
        return Attempt(values, scratch).run(self.objective)


_opened: tuple[Search, Bench] | None = None  # data and networks serve all calls of a process


def on_bench(search: Search, method: str, *arguments: Any) -> Any:
    """Call a method of the search's bench. Raises UserError or Failure if that cannot be opened."""
    global _opened
    if _opened is None or _opened[0] != search:
        _opened = search, search.open()
    return getattr(_opened[1], method)(*arguments)
