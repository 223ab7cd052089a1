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
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from advml.errors import UserError
from advml.explain import explain

SchemeName = Literal["SL", "CL", "SCL"]
RegimeName = Literal["ST", "AT", "Partial-AT", "Full-AT"]
PhaseName = Literal["st", "at"]
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


def _no_switch(value: Any) -> Any:
    """True is 1 in Python; in params.yaml it is a slip."""
    if isinstance(value, bool):
        raise PydanticCustomError("switch", "must be a number")
    return value


def _number(value: Any) -> Any:
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


Number = Annotated[float, BeforeValidator(_number), BeforeValidator(_no_switch), Field(allow_inf_nan=False)]
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


class Grid(Section):
    """Which models the study trains. AT, Partial-AT and Full-AT share one adversarial pretraining."""

    schemes: Annotated[tuple[SchemeName, ...], Field(min_length=1), Distinct]
    standard_regimes: Annotated[tuple[Literal["ST"], ...], Distinct]
    adversarial_regimes: Annotated[tuple[Literal["AT", "Partial-AT", "Full-AT"], ...], Distinct]

    @property
    def regimes(self) -> tuple[RegimeName, ...]:
        return self.standard_regimes + self.adversarial_regimes


class Data(Section):
    """Where the images come from and how they are split."""

    name: Literal["digits", "cifar10", "cifar100", "folder"]
    path: str | None = None
    image_size: Annotated[Whole, Field(ge=4)] | None = None
    channels: Literal[1, 3] | None = None
    validation: Annotated[Number, Field(gt=0, lt=1)]
    test: Annotated[Number, Field(gt=0, lt=1)]
    max_train: Count | None = None
    max_test: Count | None = None
    skip_corrupt: bool = False
    seed: Annotated[Whole, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _combinations(self) -> Data:
        if self.name == "folder" and self.path is None:
            raise ValueError("data.path is missing: data.name = 'folder' needs the folder of images, e.g. -S data.path=photos")
        if self.name == "folder" and self.image_size is None:
            raise ValueError("data.image_size is missing: data.name = 'folder' needs one size for all images, e.g. -S data.image_size=64")
        if self.validation + self.test >= 1:
            total = self.validation + self.test
            raise ValueError(f"data.validation + data.test = {total:g} leaves nothing to train on; keep the sum below 1")
        return self


class Model(Section):
    """The backbone (any timm name) and the heads on top of it."""

    backbone: str
    stem: Literal["small", "native"]
    options: dict[str, Any] = {}  # timm is the judge of them
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
    pad: Annotated[Whole, Field(ge=0)] = 0  # pixels: zero-pad, then crop back at a random place
    resized_crop: ShareRange | None = None  # share of the area; aspect ratio 3/4 to 4/3
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
    batch_size: Annotated[Whole, Field(ge=2)]
    optimizer: Literal["adamw", "adam", "sgd"]  # no defaults here: DVC tracks, and overrides, only what params.yaml writes out
    learning_rate: Positive
    weight_decay: NonNegative
    schedule: Literal["constant", "cosine", "onecycle"]
    warmup: Share  # share of all steps, linear from 0; `onecycle` has its own
    layer_decay: PositiveShare  # block k from the top learns at layer_decay^k of the rate; 1: all alike
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)]
    loss: Literal["two-term", "trades"]  # CE(x) + w CE(x + d), or CE(x) + w KL(p(x), p(x + d))
    adversarial_weight: NonNegative  # w: weight of the attacked term beside the clean one
    epsilon: Positive | None  # radius in this phase; None: threat_model.epsilon
    epsilon_warmup: Share  # share of all steps over which that radius, and the step with it, rises from 0
    attack_steps: Count | None  # in this phase; None: attack.steps
    frozen_statistics: bool  # batch norms keep the statistics of pretraining; their weights learn
    gradient_clip: Positive | None
    keep: Literal["best", "last"]  # best on validation, never on test


# The values under which a phase trains as if these keys did not exist.
NEUTRAL: dict[str, Any] = {
    "layer_decay": 1.0,
    "label_smoothing": 0.0,
    "loss": "two-term",
    "adversarial_weight": 1.0,
    "epsilon": None,
    "epsilon_warmup": 0.0,
    "attack_steps": None,
    "frozen_statistics": False,
}
OF_THE_ATTACK = ("loss", "adversarial_weight", "epsilon", "epsilon_warmup", "attack_steps")
_FROM_SCRATCH = {"frozen_statistics": "pretraining starts without statistics to keep"}
_CONTRASTIVE = dict.fromkeys(("label_smoothing", "loss"), "the contrastive objective has no cross-entropy") | _FROM_SCRATCH
_HEAD_ONLY = dict.fromkeys(("layer_decay", "frozen_statistics"), "this regime learns a head, and the encoder is fixed")
_CLEAN = dict.fromkeys(OF_THE_ATTACK, "this regime fine-tunes on clean images alone") | _HEAD_ONLY
# Phase -> the keys that it has no use for, and why; they must be neutral.
WITHOUT_EFFECT: dict[str, dict[str, str]] = {
    "pretrain.SL": _FROM_SCRATCH,
    "pretrain.CL": _CONTRASTIVE,
    "pretrain.SCL": _CONTRASTIVE,
    "regimes.ST": _CLEAN,
    "regimes.AT": _CLEAN,
    "regimes.Partial-AT": _HEAD_ONLY,
}


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
    """The attacks of `evaluate`, at epsilon and at half of it. Without `epsilon`: that of training."""

    epsilon: Positive | None = None
    batch_size: Count
    steps: Count
    step_size: Positive | None = None
    restarts: Count
    random_start: bool
    objective: Literal["ce", "margin", "dlr"]  # of the attack on the classifier
    momentum: NonNegative  # share of the earlier directions in a step; 0: none
    schedule: Literal["constant", "linear", "cosine"]  # of the step size
    keep: Literal["best", "last"]
    adversarial_images: Count | None = None  # test images whose adversarial examples are stored; None: all
    seed: Annotated[Whole, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _restarts(self) -> EvaluationAttack:
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"evaluate.restarts = {self.restarts} repeats one attack; set evaluate.random_start = true")
        return self


class WorstCase(Section):
    """The attacks behind `accuracy/worst_case`, each aimed at what threat models I and II and those before it have left standing."""

    attacks: Annotated[tuple[Literal["pgd-margin", "apgd-ce", "apgd-t", "fab-t", "square"], ...], Distinct]
    restarts: Count  # of pgd-margin, whose steps are those of `evaluate`
    steps: Count  # of APGD and FAB-T
    targets: Count  # other classes that APGD-T and FAB-T aim at, as far as there are so many
    queries: Count  # of Square


def _one_or_many(value: Any) -> Any:
    """`layers: blocks` and `layers: "*.act2"` name one thing; inside, there is always a list."""
    return (value,) if isinstance(value, str) else value


def _all_or_none(value: Any) -> Any:
    """`names: all` and `names: none` stand for lists, and so does a single name."""
    known = get_args(CorruptionName)
    value = {"all": known, "none": ()}.get(value, (value,)) if isinstance(value, str) else value
    if isinstance(value, (list, tuple)) and any(name not in known for name in value):
        raise PydanticCustomError("corruption", "{choices}", {"choices": f"choose from all, none, {', '.join(known)}"})
    return value


class Diagnostics(Section):
    """Probes for gradient masking on the first test images; their findings are flags beside the figures."""

    images: Annotated[Whole, Field(ge=0)]  # 0: no diagnostics
    steps: Count
    shares: Annotated[tuple[Positive, ...], Distinct]  # of epsilon, for the security curve
    minimal: Literal["fmn", "ddn", "cw"] | None = None
    minimal_steps: Count = 100


class Corruptions(Section):
    """Common corruptions of the test images (CIFAR-C, ImageNet-C): which, and how strong."""

    names: Annotated[tuple[CorruptionName, ...], BeforeValidator(_all_or_none), Distinct]
    severities: Annotated[tuple[Annotated[Whole, Field(ge=1, le=5)], ...], Field(min_length=1), Distinct]
    images: Count | None = None  # the first test images; None: all
    folder: str | None = None  # of the published files, read instead; None: data/raw/CIFAR-10-C, if it is there
    seed: Annotated[Whole, Field(ge=0)] = 0


class Similarity(Section):
    """What `represent` and `compare` measure, on the images whose adversarial examples `evaluate` has stored."""

    layers: Annotated[tuple[str, ...], BeforeValidator(_one_or_many), Field(min_length=1)]  # blocks, all, or patterns of names
    batch_size: Annotated[Whole, Field(ge=4)]
    gram: Literal["float32", "bfloat16"] = "float32"
    epsilon_studies: str | None = None  # folders of studies that differ in the training epsilon alone, a pattern: for claim 6
    source: str = "own"  # whose adversarial images `compare` shows to all models; own: each model's own
    probe_images: Count | None = None  # training images of the linear probes; None: all
    probe_strengths: Annotated[tuple[Positive, ...], Field(min_length=1), Distinct]  # inverse penalties to choose from


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
    numbers = [_number(end) for end in ends]
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
    number = _number(value)
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


class Tracking(Section):
    """Where MLflow keeps its history. Without `uri`: sqlite in mlflow.db, artifacts in mlruns/."""

    experiment: str
    uri: str | None = None


class Runtime(Section):
    """The machine. `threads: 0` takes all cores; a fixed number makes results the same everywhere."""

    device: str = "auto"
    threads: Annotated[Whole, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"


def _plain(value: Any) -> str:
    """As YAML writes it."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


class Config(Section):
    """All of params.yaml."""

    seeds: Annotated[tuple[Annotated[Whole, Field(ge=0)], ...], Field(min_length=1), Distinct]
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
    worst_case: WorstCase
    diagnostics: Diagnostics
    corruptions: Corruptions
    similarity: Similarity
    tune: Tune
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
        radii = {"threat_model": self.threat_model.epsilon, "evaluate": self.evaluate.epsilon}
        for key, epsilon in (radii | {key: phase.epsilon for key, phase in self.phases.items()}).items():
            if self.threat_model.norm == "linf" and epsilon is not None and epsilon > 1:
                raise ValueError(
                    f"{key}.epsilon = {epsilon:g} exceeds the whole range of a pixel; "
                    "images live in [0, 1], so write 8/255 for eight grey levels"
                )
        return self

    @model_validator(mode="after")
    def _phases(self) -> Config:
        """A value that counts twice, or not at all, would mislead whoever reads the file."""
        for key, phase in self.phases.items():
            if phase.schedule == "onecycle" and phase.warmup:
                raise ValueError(
                    f"{key}.warmup = {phase.warmup:g} doubles the warm-up of onecycle; set it to 0, or {key}.schedule = cosine"
                )
            if phase.loss == "trades" and not self.attack.random_start:
                raise ValueError(
                    f"{key}.loss = trades needs attack.random_start = true: at the image itself its divergence has no gradient to follow"
                )
        for key, name, why in ((key, name, why) for key, names in WITHOUT_EFFECT.items() for name, why in names.items()):
            if (value := getattr(self.phases[key], name)) != NEUTRAL[name]:
                raise ValueError(f"{key}.{name} = {_plain(value)} has no effect: {why}; set it to {_plain(NEUTRAL[name])}")
        return self

    @property
    def phases(self) -> dict[str, Phase]:
        """All phases by their keys, e.g. `pretrain.CL`, `regimes.Full-AT`."""
        return {f"{kind}.{name}": phase for kind in ("pretrain", "regimes") for name, phase in getattr(self, kind).items()}

    @property
    def attacked_epsilon(self) -> float:
        """The radius of `evaluate`'s attacks."""
        return self.evaluate.epsilon or self.threat_model.epsilon


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
    return validate(apply(text, overrides, source=str(path)), source=str(path))


def apply(text: str, overrides: list[str] | tuple[str, ...], *, source: str = "params.yaml") -> dict[str, Any]:
    """The mapping in a YAML text, with `key=value` overrides applied; not validated yet."""
    raw = _parse_yaml(text, source=source)
    if not isinstance(raw, dict):
        raise UserError(f"{source} holds no mapping of sections; print a complete one with: advml preset digits")
    for override in overrides:
        _apply(raw, override)
    return raw


def validate(raw: dict[str, Any], *, source: str = "params.yaml") -> Config:
    """Turn a plain mapping into a Config, or raise UserError with one line."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error.errors()[0], Config)}") from None


def changed(config: Config, values: Mapping[str, Any], *, source: str = "params.yaml") -> Config:
    """The configuration with other values under these dotted keys; checked like a file.

    Raises:
        UserError: one line naming key, value and choices.
    """
    raw = config.model_dump(mode="json")
    for key, value in values.items():
        _put(raw, key, value)
    return validate(raw, source=source)


def dump(config: Config) -> str:
    """The resolved configuration as YAML, in the order of params.yaml."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = None, False, 120
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
        # Through JSON: aliases share one object, so that an override would reach them all; dates become text.
        return json.loads(json.dumps(YAML(typ="safe", pure=True).load(text), default=str))
    except (YAMLError, TypeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark and "\n" in text else ""
        reason = (getattr(error, "problem", None) or str(error)).splitlines()[0]
        raise UserError(f"{source} is no valid YAML: {place}{reason}") from None


def parse_override(override: str) -> tuple[str, Any]:
    """`a.b=[1, 2]` -> ("a.b", [1, 2]); the value is read as YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"-S {override} is not of the form key=value, e.g. -S threat_model.epsilon=8/255")
    return key.strip(), _parse_yaml(value, source=f"-S {override}")


def _apply(raw: dict[str, Any], override: str) -> None:
    key, value = parse_override(override)
    _put(raw, key, value, told="-S ")


def _put(raw: dict[str, Any], key: str, value: Any, *, told: str = "") -> None:
    node: Any = raw
    *parents, leaf = key.split(".")
    for done, name in enumerate(parents):
        if name not in node:
            raise UserError(f"{told}{key}: unknown key '{'.'.join(parents[: done + 1])}'; choose from {', '.join(node)}")
        if not isinstance(node[name], dict):
            raise UserError(f"{told}{key}: '{'.'.join(parents[: done + 1])}' is a value, not a section")
        node = node[name]
    node[leaf] = value
