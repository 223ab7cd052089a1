"""What `advml tune` searches: trials, budgets, and spaces of values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from advml.config.values import Batch, Images, Section, Seed, Share, Trials, Whole, as_number, plain_value

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
        if len(chosen) > 1000:
            raise PydanticCustomError("dimension", "must hold at most 1000")
        for end in chosen:
            plain_value(end)
        return {kind: chosen}
    numbers = [as_number(end) for end in ends]
    if len(numbers) != 2 or not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in numbers):
        raise PydanticCustomError("dimension", "must hold two numbers, low and high")
    for end in numbers:
        plain_value(end)
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
Key = Annotated[str, Field(max_length=100, pattern=r"^[a-z_0-9]+(\.[a-z_0-9]+)*$", description="a key, e.g. epsilon or view.shift")]
Space = Annotated[dict[Key, Dimension], Field(max_length=100)]


class AttackSearch(Section):
    """`advml tune attack`: the strongest attack within a fixed number of forward and backward passes per image."""

    trials: Trials  # in all, of all workers and repeated commands
    budget: Trials | None  # steps * restarts; None: that of `evaluate`
    images: Images | None  # validation images; None: all
    batch_size: Batch  # images between two decisions whether to go on with a trial
    seed: Seed
    space: Space


class TrainingSearch(Section):
    """`advml tune finetune` and `advml tune pretrain`: the most robust training that keeps a clean accuracy."""

    trials: Trials
    clean_floor: Share  # least clean validation accuracy of a winner
    confirm: Annotated[Whole, Field(ge=0, le=1000)]  # further seeds on which winner and default are compared
    seed: Seed
    space: Space


class Tune(Section):
    """What `advml tune` searches. It writes proposals; only `advml tune apply` changes params.yaml."""

    attack: AttackSearch
    finetune: TrainingSearch
    pretrain: TrainingSearch
