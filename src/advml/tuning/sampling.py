"""How trials are chosen, and which are stopped early."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import optuna

REDUCTION = 3  # of Hyperband: the share of trials that goes on from rung to rung is its inverse


@dataclass(frozen=True)
class Hyperband:
    """Makes a Hyperband pruner whose resource is the epoch (Li et al. 2018)."""

    epochs: int

    def __call__(self) -> optuna.pruners.BasePruner:
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=self.epochs, reduction_factor=REDUCTION)

    @staticmethod
    def rungs(epochs: int) -> tuple[int, ...]:
        """The epochs 1, 3, 9, ... at which it compares trials."""
        found = [1]
        while found[-1] * REDUCTION < epochs:
            found.append(found[-1] * REDUCTION)
        return tuple(found)


def tpe(seed: int) -> optuna.samplers.BaseSampler:
    """TPE, multivariate, which takes trials at work for bad ones (constant liar) and constraints into account."""
    return optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=8)


def wilcoxon() -> optuna.pruners.BasePruner:
    """Stops a trial that the best one beats batch by batch, by the signed-rank test at p < 0.1 (Wilcoxon 1945)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner()
