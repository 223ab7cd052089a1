"""Interface of searches: the search space, the choice and pruning of trials, and the work of processes."""

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
from advml.core.provenance import check_data
from advml.engine import process_task
from advml.tuning.space import Space, Values, distributions, holds

REDUCTION = 3  # Hyperband's reduction factor: one in three trials continues at each rung


@dataclass(frozen=True, kw_only=True)
class Search(ABC):
    """Base class of searches. Picklable, because it is sent to the processes that run trials.

    Attributes:
        root: absolute path of the study's folder, since processes run in other folders.
        name: in the database, in paths and in MLflow, e.g. `attack-SL-AT-s0`.
        kind: its section of `tune`: attack, finetune or pretrain.
        work: name of the module with its `Bench`, which imports torch.
        metrics: names of the objectives.
        directions: "minimize" or "maximize", one per objective.
        once: measurements for best.yaml that do not depend on the winner, e.g. ("autoattack",).
        further_seeds: number of seeds on which winner and default are trained again and compared.
        left_out: keys of the space in params.yaml that have no effect here.
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
    left_out = ()

    @abstractmethod
    def default(self) -> Values:
        """Values of params.yaml, with which the search starts, and to which the winner is compared."""

    @abstractmethod
    def proposal(self, values: Values) -> dict[str, Any]:
        """Values by their full keys in params.yaml."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of space, configuration, data and weights; a search with another digest is another search."""

    @abstractmethod
    def pruner(self) -> optuna.pruners.BasePruner:
        """Pruner, which stops poor trials by their reports."""

    @abstractmethod
    def tags(self) -> dict[str, Any]:
        """Tags of the MLflow run."""

    @property
    def spec(self) -> Any:
        """Section `tune.<kind>`: space, budget, seed."""
        return getattr(self.config.tune, self.kind)

    @property
    def space(self) -> Space:
        """Search space: ranges of the keys."""
        return self.spec.space

    def missed(self) -> Values:
        """Default values outside of the space; if there are any, the default is not tried."""
        default = self.default()
        return {key: default[key] for key, spread in distributions(self.space).items() if not holds(spread, default[key])}

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """Multivariate TPE sampler with constraints, which counts running trials as bad ones (constant liar)."""
        return optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=8)

    def open(self) -> Bench:
        """Load data and networks, which takes seconds."""
        return importlib.import_module(self.work).Bench(self)


def hyperband(epochs: int) -> optuna.pruners.BasePruner:
    """Hyperband pruner with the epoch as resource (Li et al. 2018)."""
    return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=REDUCTION)


def rungs(epochs: int) -> tuple[int, ...]:
    """Epochs 1, 3, 9, ... below `epochs` at which Hyperband compares trials; at least the first."""
    return tuple(REDUCTION**n for n in range(epochs) if n == 0 or REDUCTION**n < epochs)


def data_digest(root: Path) -> str:
    """Digest of the prepared data, read without torch; raises UserError if there are none."""
    return read_json(Workspace(root).prepared / "dataset.json", needs=("digest",), remedy="make the data with: advml prepare")["digest"]


def weights_digest(folder: Path, root: Path, *, remedy: str) -> str:
    """Digest of a model's weights, read without torch; raises UserError if it is missing or was trained on other data."""
    record = read_json(folder / "model.json", needs=("digest",), remedy=remedy)
    check_data(folder, record, prepared=Workspace(root).prepared, here=data_digest(root))
    return record["digest"]


# In the processes


@dataclass
class Attempt:
    """A running trial in its process; afterwards its result, which is sent to the driver.

    Attributes:
        values: the values tried.
        scratch: folder that is kept for a retry of this trial.
        ask: sends step, value and `measured` of a report to the driver; returns whether to stop.
        history: one record per epoch or batch.
        measured: figures besides the objectives.
        constraints: violation of each constraint; fulfilled if at most 0.
        objectives: None unless the trial is complete.
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
        """Report an intermediate value for the pruner, and figures to display instead of it.

        Raises:
            optuna.TrialPruned: the pruner stops the trial.
        """
        if self.ask((step, value, measured)):
            raise optuna.TrialPruned

    def run(self, objective: Callable[[Attempt], Sequence[float]]) -> Attempt:
        """Run the objective, and store its result or its error; returns itself."""
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
    """Data and networks of a search, loaded in a process that runs its trials. Also has a method for each of `Search.once`."""

    @abstractmethod
    def objective(self, attempt: Attempt) -> Sequence[float]:
        """Run a trial; returns its objectives."""

    @abstractmethod
    def confirm(self, values: Values) -> dict[str, Any]:
        """Measure the winner for best.yaml."""

    def trial(self, values: Values, scratch: Path) -> Attempt:
        return Attempt(values, scratch).run(self.objective)


_opened: tuple[Search, Bench] | None = None  # cached for all calls of this process


def on_bench(search: Search, method: str, *arguments: Any) -> Any:
    """Call a method of the search's bench; raises UserError or Failure if the bench cannot be opened."""
    global _opened
    if _opened is None or _opened[0] != search:
        _opened = search, search.open()
    return getattr(_opened[1], method)(*arguments)
