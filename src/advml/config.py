"""params.yaml as frozen pydantic models: the one source of every parameter.

    >>> config = load("params.yaml", overrides=["threat_model.epsilon=8/255", "seeds=[0, 1, 2]"])
    >>> config.threat_model.epsilon
    0.03137254901960784
    >>> print(dump(config))          # the resolved configuration, as YAML

An unknown key, a wrong value or a combination that cannot work raises `UserError` with one line that
names the key, the value and the choices.
"""

from __future__ import annotations

import hashlib
import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from advml.errors import UserError

SchemeName = Literal["SL", "CL", "SCL"]
RegimeName = Literal["ST", "AT", "Partial-AT", "Full-AT"]
PhaseName = Literal["st", "at"]


def _number(value: Any) -> Any:
    """`8/255` and `1e-3` arrive from YAML as strings; anything that is no number is left to pydantic."""
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Range = tuple[NonNegative, NonNegative]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of params.yaml. Unknown keys are errors; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Grid(Section):
    """Which models the study trains. AT, Partial-AT and Full-AT share one adversarial pretraining."""

    schemes: tuple[SchemeName, ...] = Field(min_length=1)
    standard_regimes: tuple[Literal["ST"], ...]
    adversarial_regimes: tuple[Literal["AT", "Partial-AT", "Full-AT"], ...]

    @property
    def regimes(self) -> tuple[RegimeName, ...]:
        return self.standard_regimes + self.adversarial_regimes


class Data(Section):
    """Where the images come from and how they are split."""

    name: Literal["digits", "cifar10", "cifar100", "folder"]
    path: str | None = None
    image_size: Annotated[int, Field(ge=4)] | None = None
    channels: Literal[1, 3] | None = None
    validation: Annotated[Number, Field(gt=0, lt=1)]
    test: Annotated[Number, Field(gt=0, lt=1)]
    max_train: Count | None = None
    max_test: Count | None = None
    skip_corrupt: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _combinations(self) -> Data:
        if self.name == "folder" and self.path is None:
            raise ValueError("data.path is missing: data.name = 'folder' needs the folder of images, e.g. -S data.path=photos")
        if self.name == "folder" and self.image_size is None:
            raise ValueError("data.image_size is missing: data.name = 'folder' needs one size for all images, e.g. -S data.image_size=64")
        if self.validation + self.test >= 1:
            raise ValueError(f"data.validation + data.test = {self.validation + self.test:g} leaves nothing to train on; keep the sum below 1")
        return self


class Model(Section):
    """The backbone (any timm name) and the heads on top of it."""

    backbone: str
    stem: Literal["small", "native"]
    options: dict[str, bool | int | Number | str] = {}
    projection_size: Count
    normalize_logits: bool
    batch_norm: Literal["single", "dual"]


class View(Section):
    """One random view of an image; every sample of a batch draws its own parameters.

    Geometry first (one resampling), then colour, as in SimCLR. A zero or null switches a part off.
    """

    rotation: NonNegative = 0.0  # degrees, uniform in [-rotation, rotation]
    scale: Range = (1.0, 1.0)  # zoom factor, uniform
    shift: NonNegative = 0.0  # share of the image's side, uniform in [-shift, shift], both axes
    pad: Annotated[int, Field(ge=0)] = 0  # pixels: zero-pad, then crop back at a random place
    resized_crop: tuple[Share, Share] | None = None  # share of the area; aspect ratio 3/4 to 4/3
    flip: Share = 0.0  # probability of a horizontal flip
    brightness: NonNegative = 0.0  # factor uniform in [max(0, 1 - b), 1 + b]
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    jitter: Share = 1.0  # probability that the four above apply
    grey: Share = 0.0  # probability of turning grey


class Views(Section):
    """The views of pretraining: one kind for the supervised scheme, one for the contrastive ones."""

    supervised: View
    contrastive: View


class Phase(Section):
    """One training phase: how long, with which optimiser, and what is kept."""

    epochs: Count
    batch_size: Annotated[int, Field(ge=2)]
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "onecycle"] = "cosine"
    warmup: Share = 0.0  # share of all steps, linear from 0; `onecycle` has its own
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    adversarial_weight: NonNegative = 1.0  # weight of the attacked term beside the clean one
    gradient_clip: Positive | None = None
    keep: Literal["best", "last"] = "best"  # best on validation, never on test


class ThreatModelSection(Section):
    """The ball that bounds the perturbation; images live in [0, 1], so 8/255 means eight grey levels."""

    norm: Literal["linf", "l2"]
    epsilon: Positive


class TrainAttack(Section):
    """The attack inside training. Without `step_size` a step is 2.5 * epsilon / steps."""

    steps: Count
    step_size: Positive | None = None
    random_start: bool
    batch_norm: Literal["eval", "train"]  # the mode of the model while it is attacked


class EvaluationAttack(Section):
    """The attacks of `evaluate`, at epsilon and at half of it."""

    batch_size: Count
    steps: Count
    step_size: Positive | None = None
    restarts: Count
    random_start: bool
    keep: Literal["best", "last"]
    seed: int = 0


class Tracking(Section):
    """Where MLflow keeps its history. Without `uri`: sqlite in mlflow.db, artifacts in mlruns/."""

    experiment: str
    uri: str | None = None


class Runtime(Section):
    """The machine. `threads: 0` takes all cores; a fixed number makes results the same everywhere."""

    device: str = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"


class Config(Section):
    """All of params.yaml."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    grid: Grid
    data: Data
    model: Model
    temperature: Positive
    views: Views
    threat_model: ThreatModelSection
    attack: TrainAttack
    pretrain: dict[SchemeName, Phase]
    regimes: dict[RegimeName, Phase]
    evaluate: EvaluationAttack
    tracking: Tracking
    runtime: Runtime

    @model_validator(mode="after")
    def _complete(self) -> Config:
        for key, present, names in (
            ("pretrain", self.pretrain, get_args(SchemeName)),
            ("regimes", self.regimes, get_args(RegimeName)),
        ):
            missing = [name for name in names if name not in present]
            if missing:
                raise ValueError(f"{key} lacks the section {missing[0]}; it needs {', '.join(names)}")
        if self.threat_model.norm == "linf" and self.threat_model.epsilon > 1:
            raise ValueError(
                f"threat_model.epsilon = {self.threat_model.epsilon:g} exceeds the whole range of a pixel; "
                "images live in [0, 1], so write 8/255 for eight grey levels"
            )
        return self


def load(path: str | Path = "params.yaml", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read params.yaml, apply `key=value` overrides, validate.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings; the value is read as YAML, so lists and null work.
    Raises:
        UserError: one line naming file, key, value and choices.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; write one with: advml preset digits > {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    raw = _parse_yaml(text, source=str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no mapping of sections; print a complete one with: advml preset digits")
    raw = json.loads(json.dumps(raw))  # YAML aliases share one object: an override would reach them all
    for override in overrides:
        _apply(raw, override)
    return validate(raw, source=str(path))


def validate(raw: dict[str, Any], *, source: str = "params.yaml") -> Config:
    """Turn a plain mapping into a Config, or raise UserError with one line."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error.errors()[0], raw)}") from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML, in the order of params.yaml."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = None
    stream = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; lists stay values."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()}


def digest(*parts: Any) -> str:
    """A short, stable fingerprint of JSON-like values and pydantic models (16 hex digits)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _parse_yaml(text: str, *, source: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserError(f"{source} is no valid YAML: {' '.join(str(error).split())}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"-S {override} is not of the form key=value, e.g. -S threat_model.epsilon=8/255")
    node: Any = raw
    *parents, leaf = key.strip().split(".")
    for done, name in enumerate(parents):
        if name not in node:
            raise UserError(f"-S {key}: unknown key '{'.'.join(parents[: done + 1])}'; choose from {_names(node)}")
        if not isinstance(node[name], dict):
            raise UserError(f"-S {key}: '{'.'.join(parents[: done + 1])}' is a value, not a section")
        node = node[name]
    node[leaf] = _parse_yaml(value, source=f"-S {override}")


def _names(mapping: Any) -> str:
    return ", ".join(str(key) for key in mapping)


def _section(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model class that a validation error's location ends in, so that its fields can be offered."""
    current: Any = Config
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[part].annotation
        if getattr(current, "__origin__", None) is dict:
            current = get_args(current)[1] if part in get_args(get_args(current)[0]) else current
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _explain(error: dict[str, Any], raw: dict[str, Any]) -> str:
    """One line naming key, value and choices."""
    location = tuple(part for part in error["loc"] if part != "[key]")
    key = ".".join(str(part) for part in location)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        section = _section(location[:-1])
        return f"unknown key '{key}'; choose from {_names(section.model_fields if section else raw)}"
    if kind == "missing":
        return f"{key} is missing"
    expected = context.get("expected")
    remedy = f"choose from {expected.replace(' or ', ', ')}" if expected else error["msg"][0].lower() + error["msg"][1:]
    return f"{key} = {error['input']!r}; {remedy}"
