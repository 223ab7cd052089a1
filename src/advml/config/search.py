"""What `advml tune` searches: trials, budgets, and spaces of values."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from advml.config.values import Count, Section, Share, Whole, as_number

SPACE_KINDS = ("float", "log", "int", "choice")


def _dimension(value: Any) -> dict[str, list[Any]]:
    """`{log: [1e-4, 1e-1]}`, `{float: [0, 1]}`, `{int: [5, 20]}` or `{choice: [two-term, trades]}`; numbers as everywhere."""
    if not isinstance(value, dict) or len(value) != 1 or not {*value} <= {*SPACE_KINDS}:
        raise PydanticCustomError(
            "dimension", "must be one of {{float: [low, high]}}, {{log: [low, high]}}, {{int: [low, high]}}, {{choice: [...]}}"
        )
    ((kind, ends),) = value.items()
    if not isinstance(ends, (list, tuple)) or not ends:
        raise PydanticCustomError("dimension", "must hold a list in brackets")
    if kind == "choice":
        chosen = [_as_plain(end) for end in ends]
        if any(isinstance(end, (list, dict)) for end in chosen) or len({repr(end) for end in chosen}) < len(chosen):
            raise PydanticCustomError("dimension", "must list plain values, each once")
        return {kind: chosen}
    numbers = [as_number(end) for end in ends]
    if len(numbers) != 2 or not all(isinstance(end, (int, float)) and not isinstance(end, bool) and math.isfinite(end) for end in numbers):
        raise PydanticCustomError("dimension", "must hold two numbers, low and high")
    if numbers[0] >= numbers[1]:
        raise PydanticCustomError("dimension", "must run from low to high")
    if kind == "log" and numbers[0] <= 0:
        raise PydanticCustomError("dimension", "must lie above 0 to be searched in logarithms")
    if kind == "int" and not all(float(end).is_integer() for end in numbers):
        raise PydanticCustomError("dimension", "must hold whole numbers")
    return {kind: [int(end) if kind == "int" else float(end) for end in numbers]}


def _as_plain(value: Any) -> Any:
    """Choices may be words or numbers: of text, only what is meant as a number becomes one."""
    number = as_number(value)
    return number if isinstance(value, str) and isinstance(number, float) else value


Dimension = Annotated[dict[str, Any], BeforeValidator(_dimension)]


class AttackSearch(Section):
    """`advml tune attack`: the strongest attack within a fixed number of forward and backward passes per image."""

    trials: Count  # in all, of all workers and repeated commands
    budget: Count | None  # steps * restarts; None: that of `evaluate`
    images: Count | None  # validation images; None: all
    batch_size: Count  # images between two decisions whether to go on with a trial
    seed: Annotated[Whole, Field(ge=0)]
    space: dict[str, Dimension]


class TrainingSearch(Section):
    """`advml tune finetune` and `advml tune pretrain`: the most robust training that keeps a clean accuracy."""

    trials: Count
    clean_floor: Share  # least clean validation accuracy of a winner
    confirm: Annotated[Whole, Field(ge=0)]  # further seeds on which winner and default are compared
    seed: Annotated[Whole, Field(ge=0)]
    space: dict[str, Dimension]


class Tune(Section):
    """What `advml tune` searches. It writes proposals; only `advml tune apply` changes params.yaml."""

    attack: AttackSearch
    finetune: TrainingSearch
    pretrain: TrainingSearch
