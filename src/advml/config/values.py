"""Types of values in params.yaml, each with its range or form, and the base class of its sections."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _no_switch(value: Any) -> Any:
    """Refuse `true` for a number, although Python's True equals 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("switch", "must be a number")
    return value


def as_number(value: Any) -> Any:
    """Convert text such as `8/255` or `1e-3` to a number; other values are returned unchanged, for pydantic to check."""
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
    """Refuse repeated names, which would be stages that write the same files."""
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "must not name anything twice")
    return values


LARGEST = 1e30  # bound on numbers without a range of their own: options of a backbone, ends and choices of a search


def plain_value(value: Any) -> Any:
    """Check a value of a search space or a timm option: finite numbers, texts of one line, and lists of these."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) <= LARGEST:  # also true for nan
        raise PydanticCustomError("plain", "must hold finite numbers of at most 1e30")
    if isinstance(value, str) and (len(value) > 1000 or not value.isprintable()):
        raise PydanticCustomError("plain", "must hold texts of at most 1000 characters, without control characters")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        plain_value(inner)
    return value


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Check keyword arguments for a library: their names, and the types of their values; the library checks the rest."""
    if unfit := next((key for key in options if not key.isidentifier()), None):
        raise PydanticCustomError("option", "must have names of options as keys, and {key} is none", {"key": repr(unfit)})
    return plain_value(options)


# Types with bounds: every number has a range, every text a form, every list a greatest length.
Number = Annotated[float, BeforeValidator(as_number), BeforeValidator(_no_switch), Field(allow_inf_nan=False)]
Epsilon = Annotated[Number, Field(ge=1e-6, le=1e4)]  # float32 resolves 6e-8 near 1; the L2 diameter of 3 x 4096 x 4096 pixels is 7,094
StepSize = Annotated[Number, Field(ge=1e-12, le=1e4)]
Strength = Annotated[Number, Field(ge=0, le=100)]  # strength of a change of brightness, contrast or saturation
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
        json_schema_extra={"form": "text in one line, not empty, without control characters"},
    ),
]
Options = Annotated[dict[str, Any], Field(max_length=100), AfterValidator(checked_options)]


def means(explanation: str, default: Any = ..., **more: Any) -> Any:
    """Define a key with its explanation, and its neutral default if it has one."""
    return Field(default, description=explanation, **more)


class Section(BaseModel):
    """Base class of the sections of params.yaml. Unknown keys are errors; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)  # built on first use: `--help` needs no schema


# Lists that may be written as one word

CorruptionName = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]

MeasureName = Literal["cka", "cka-pooled", "cka-rbf", "procrustes", "shape", "rsa", "svcca", "knn", "r2"]


def _all_or_none(value: Any) -> Any:
    """Convert `all`, `none` or a single name to a list of corruptions."""
    known = get_args(CorruptionName)
    value = {"all": known, "none": ()}.get(value, (value,)) if isinstance(value, str) else value
    if isinstance(value, (list, tuple)) and any(name not in known for name in value):
        raise PydanticCustomError("corruption", "{choices}", {"choices": f"choose from all, none, {', '.join(known)}"})
    return value


OneOrMany = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)  # a single word, as in `layers: blocks`
AllOrNone = BeforeValidator(_all_or_none)


# Ranges of a search

SPACE_KINDS = ("float", "log", "int", "choice")


def _dimension(value: Any) -> dict[str, list[Any]]:
    """Check a range of a search: `{log: [1e-4, 1e-1]}`, `{float: [0, 1]}`, `{int: [5, 20]}` or `{choice: [two-term, trades]}`."""
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
            raise PydanticCustomError("dimension", "must hold at most 1000 values")
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
        raise PydanticCustomError("dimension", "must be above 0 for a logarithmic search")
    if kind == "int" and not all(float(end).is_integer() for end in numbers):
        raise PydanticCustomError("dimension", "must hold whole numbers")
    return {kind: [int(end) if kind == "int" else float(end) for end in numbers]}


def _as_plain(value: Any) -> Any:
    """Convert a choice of a search: text that reads as a number becomes one, other text stays."""
    number = as_number(value)
    return number if isinstance(value, str) and isinstance(number, float) else value


Dimension = Annotated[dict[str, Any], BeforeValidator(_dimension)]
Key = Annotated[
    str, Field(max_length=100, pattern=r"^[a-z_0-9]+(\.[a-z_0-9]+)*$", json_schema_extra={"form": "a key, e.g. epsilon or view.shift"})
]
Space = Annotated[dict[Key, Dimension], Field(max_length=100)]
