"""The kinds of values in params.yaml, and what all its sections have in common."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _no_switch(value: Any) -> Any:
    """True is 1 in Python; in params.yaml it is a slip."""
    if isinstance(value, bool):
        raise PydanticCustomError("switch", "must be a number")
    return value


def as_number(value: Any) -> Any:
    """`8/255` and `'1e-3'` are strings in YAML; anything that is no number is left to pydantic."""
    if not isinstance(value, str):
        return value
    for read in (float, Fraction):
        try:
            return float(read(value.replace(" ", "")))
        except (ValueError, ArithmeticError):
            continue
    return value


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise PydanticCustomError("rising", "must run from low to high")
    return ends


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Twice the same name would be twice the same stage, written to the same place."""
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "must not name anything twice")
    return values


Number = Annotated[float, BeforeValidator(as_number), BeforeValidator(_no_switch), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
PositiveShare = Annotated[Number, Field(gt=0, le=1)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_rising)]
ShareRange = Annotated[tuple[PositiveShare, PositiveShare], AfterValidator(_rising)]
Whole = Annotated[int, BeforeValidator(_no_switch)]
Count = Annotated[Whole, Field(ge=1)]
Distinct = AfterValidator(_distinct)


class Section(BaseModel):
    """A section of params.yaml. Unknown keys are errors; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)  # built on first use: `--help` needs no schema
