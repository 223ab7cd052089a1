"""The contract between a search and its driver: what is searched, and how trials are chosen and stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna

from advml.config import Config
from advml.core.io import read_json
from advml.core.paths import Workspace
from advml.tuning import space as spaces
from advml.tuning.space import Space, Values
from advml.tuning.trial import Objective

REDUCTION = 3  # of Hyperband: the share of trials that goes on from rung to rung is its inverse


class Search(ABC):
    """What is searched. Picklable: it is sent to the processes that run its trials.

    Attributes:
        kind: its section of `tune`: attack, finetune or pretrain.
        name: in the database, in paths and in MLflow, e.g. `attack-SL-AT-s0`.
        metrics: names of the objectives.
        directions: "minimize" or "maximize", one per objective.
        once: measurements for best.yaml that do not depend on the winner, e.g. ("autoattack",); functions of `work`.
        further_seeds: number of seeds on which winner and default are trained again and compared.
        work: the module that imports torch, with `objective(search)`, `confirm(search, values)` and `once`.
    """

    config: Config
    root: Path
    kind: str
    name: str
    metrics: tuple[str, ...] = ("robust",)
    directions: tuple[str, ...] = ("maximize",)
    once: tuple[str, ...] = ()
    further_seeds: int = 0
    work: ModuleType

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

    def parameters(self) -> dict[str, Any]:
        """Of the MLflow run: space and budget."""
        return {"tune": {self.kind: {**self.spec.model_dump(mode="json"), "space": dict(self.space)}}}

    @property
    def spec(self) -> Any:
        """The section `tune.<kind>`."""
        return getattr(self.config.tune, self.kind)

    @property
    def space(self) -> Space:
        """Ranges of the keys."""
        return self.spec.space

    def missed(self) -> Values:
        """The default's values that the space does not contain: the search does not start from it, then."""
        return spaces.outside(self.default(), self.space)

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """TPE, multivariate, which takes trials at work for bad ones (constant liar) and constraints into account."""
        return optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=8)

    def open(self) -> Objective:
        """Load data and networks, which is costly; returns what runs a trial and gives its objectives."""
        return self.work.objective(self)

    def confirm(self, values: Values) -> dict[str, Any]:
        """Measure the winner once more, for best.yaml."""
        return self.work.confirm(self, values)

    def measure(self, name: str) -> dict[str, Any]:
        """Measure one of `once`."""
        return getattr(self.work, name)(self)


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
