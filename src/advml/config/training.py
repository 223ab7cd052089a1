"""How models are trained: the views of an image, the attack inside training, and the phases."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from advml.config.values import Epsilon, Number, PositiveShare, Section, Share, ShareRange, Steps, StepSize, Strength, Whole, Zoom


class View(Section):
    """One random view of an image; every sample of a batch draws its own parameters.

    Geometry first (one resampling), then colour, as in SimCLR. A zero or null switches a part off.
    """

    rotation: Annotated[Number, Field(ge=0, le=360)] = 0.0  # degrees, uniform in [-rotation, rotation]
    scale: Zoom = (1.0, 1.0)  # zoom factor, uniform
    shift: Share = 0.0  # share of the image's side, uniform in [-shift, shift], both axes
    pad: Annotated[Whole, Field(ge=0, le=1000)] = 0  # pixels: zero-pad, then crop back at a random place
    resized_crop: ShareRange | None = None  # share of the area; aspect ratio 3/4 to 4/3
    flip: Share = 0.0  # probability of a horizontal flip
    brightness: Strength = 0.0  # factor uniform in [max(0, 1 - b), 1 + b]
    contrast: Strength = 0.0
    saturation: Strength = 0.0
    hue: Annotated[Number, Field(ge=0, le=0.5)] = 0.0
    jitter: Share = 1.0  # probability that the four above apply
    grey: Share = 0.0  # probability of turning grey


class Views(Section):
    """The views of pretraining: one kind for the supervised scheme, one for the contrastive ones."""

    supervised: View
    contrastive: View


class TrainAttack(Section):
    """The attack inside training. Without `step_size` a step is 2.5 * epsilon / steps."""

    steps: Steps
    step_size: StepSize | None = None
    random_start: bool
    batch_norm: Literal["eval", "train"]  # the mode of the model while it is attacked


class Phase(Section):
    """One training phase: how long, with which optimiser, and what is kept."""

    epochs: Annotated[Whole, Field(ge=1, le=100_000)]
    batch_size: Annotated[Whole, Field(ge=2, le=2**20)]
    optimizer: Literal["adamw", "adam", "sgd"]  # no defaults here: DVC tracks, and overrides, only what params.yaml writes out
    learning_rate: Annotated[Number, Field(ge=1e-30, le=1e30)]  # optimisers multiply it, and float32 ends at 3e38
    weight_decay: Annotated[Number, Field(ge=0, le=1000)]
    schedule: Literal["constant", "cosine", "onecycle"]
    warmup: Share  # share of all steps, linear from 0; `onecycle` has its own
    layer_decay: PositiveShare  # block k from the top learns at layer_decay^k of the rate; 1: all alike
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)]
    loss: Literal["two-term", "trades"]  # CE(x) + w CE(x + d), or CE(x) + w KL(p(x), p(x + d))
    adversarial_weight: Annotated[Number, Field(ge=0, le=1e6)]  # w: weight of the attacked term beside the clean one
    epsilon: Epsilon | None  # radius in this phase; None: threat_model.epsilon
    epsilon_warmup: Share  # share of all steps over which that radius, and the step with it, rises from 0
    attack_steps: Steps | None  # in this phase; None: attack.steps
    frozen_statistics: bool  # batch norms keep the statistics of pretraining; their weights learn
    gradient_clip: Annotated[Number, Field(ge=1e-9, le=1e9)] | None
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
