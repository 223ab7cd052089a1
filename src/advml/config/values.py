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


LARGEST = 1e30  # of the numbers that have no range of their own: options of a backbone, ends and choices of a search


def plain_value(value: Any) -> Any:
    """A number, a text or a list of a search or of timm: finite, and in one line."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) <= LARGEST:  # true of nan, too
        raise PydanticCustomError("plain", "must hold finite numbers of at most 1e30")
    if isinstance(value, str) and (len(value) > 1000 or not value.isprintable()):
        raise PydanticCustomError("plain", "must hold texts without control characters, of at most 1000")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        plain_value(inner)
    return value


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a library, which is the judge of the rest."""
    if unfit := next((key for key in options if not key.isidentifier()), None):
        raise PydanticCustomError("option", "must name options, and {key} is no name", {"key": repr(unfit)})
    return plain_value(options)


# Every number has a range, every text a form, every list a length: beyond them a value means nothing, or nothing can be done with it.
Number = Annotated[float, BeforeValidator(as_number), BeforeValidator(_no_switch), Field(allow_inf_nan=False)]
Epsilon = Annotated[Number, Field(ge=1e-6, le=1e4)]  # float32 resolves 6e-8 near 1; the L2 diameter of 3 x 4096 x 4096 pixels is 7,094
StepSize = Annotated[Number, Field(ge=1e-12, le=1e4)]
Strength = Annotated[Number, Field(ge=0, le=100)]  # of a change of brightness, contrast or saturation
Share = Annotated[Number, Field(ge=0, le=1)]
PositiveShare = Annotated[Number, Field(ge=1e-4, le=1)]
Zoom = Annotated[tuple[Annotated[Number, Field(ge=0.01, le=100)], Annotated[Number, Field(ge=0.01, le=100)]], AfterValidator(_rising)]
ShareRange = Annotated[tuple[PositiveShare, PositiveShare], AfterValidator(_rising)]
Whole = Annotated[int, BeforeValidator(_no_switch)]
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]
Images = Annotated[Whole, Field(ge=1, le=10**9)]  # a number of images
Steps = Annotated[Whole, Field(ge=1, le=10_000)]  # of an attack
Repeats = Annotated[Whole, Field(ge=1, le=1000)]
Trials = Annotated[Whole, Field(ge=1, le=10**6)]
Batch = Annotated[Whole, Field(ge=1, le=2**20)]
Distinct = AfterValidator(_distinct)
Short = Field(max_length=1000)  # of a list
Some = Field(min_length=1, max_length=1000)
_CONTROL = r"\p{Cc}\p{Zl}\p{Zp}"
Text = Annotated[
    str,
    Field(
        max_length=1000,
        pattern=rf"^[^{_CONTROL}]*[^{_CONTROL}\s][^{_CONTROL}]*$",
        description="text in one line, not empty, without control characters",
    ),
]


class Section(BaseModel):
    """A section of params.yaml. Unknown keys are errors; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)  # built on first use: `--help` needs no schema
