"""Search spaces: conversion from params.yaml to Optuna's distributions, and checks before the first trial.

>>> distributions({"learning_rate": {"log": [1e-4, 1e-1]}, "loss": {"choice": ["two-term", "trades"]}})
{'learning_rate': FloatDistribution(high=0.1, log=True, low=0.0001), 'loss': CategoricalDistribution(...)}
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from advml.core.errors import UserError

Space = Mapping[str, Mapping[str, Any]]  # key -> {kind: ends or choices}, checked by `config.Dimension`
Values = dict[str, Any]  # key -> value

KINDS: dict[str, Callable[[Any], BaseDistribution]] = {
    "float": lambda ends: FloatDistribution(*ends),
    "log": lambda ends: FloatDistribution(*ends, log=True),
    "int": lambda ends: IntDistribution(*ends),
    "choice": CategoricalDistribution,
}


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna distribution of every key."""
    return {key: KINDS[kind](argument) for key, dimension in space.items() for kind, argument in dimension.items()}


def corners(dimension: Mapping[str, Any]) -> tuple[Any, ...]:
    """Both ends of a range, or all choices: if a configuration accepts these values, it accepts those between them."""
    return tuple(next(iter(dimension.values())))


def check(space: Space, accept: Callable[[Values], object], *, section: str) -> None:
    """Refuse a space that contains invalid configurations: tries every corner, every pair of corners, and a value inside each range.

    Args:
        accept: builds the configuration with some values replaced; raises UserError if they are invalid.
        section: the key of the space in params.yaml, e.g. `tune.attack.space`.
    Raises:
        UserError: the space is empty or contains an invalid configuration; names the values and the reason.
    """
    if not space:
        raise UserError(f"{section} is empty; name a key and its range, e.g. {section}.learning_rate: {{log: [1e-4, 1e-1]}}")
    tried = [[(key, corner) for corner in corners(dimension)] for key, dimension in space.items()]
    alone = [[pair] for pairs in tried for pair in pairs]
    for key, spread in distributions(space).items():  # and a value inside, not an integer, in case the key accepts only integers
        if isinstance(spread, FloatDistribution) and spread.low < spread.high:
            alone.append([(key, spread.low + (spread.high - spread.low) / math.pi)])
    together = [[one, other] for first, second in itertools.combinations(tried, 2) for one in first for other in second]
    for chosen in (*alone, *together):
        try:
            accept(dict(chosen))
        except UserError as error:
            said = ", ".join(f"{key} = {value!r}" for key, value in chosen)
            raise UserError(f"{section} reaches {said}, which is refused: {error}") from None


def show(values: Values) -> str:
    """Values in one line: `learning_rate=0.00213 loss=trades`."""
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())


def holds(spread: BaseDistribution, value: Any) -> bool:
    """Whether a distribution contains the value, so that a search can start from it."""
    try:
        return spread._contains(spread.to_internal_repr(value))
    except (TypeError, ValueError):  # null in a range of numbers, or no such choice
        return False
