"""What is measured on a trained model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from advml.config.values import (
    Batch,
    Distinct,
    Epsilon,
    Images,
    Number,
    Repeats,
    Section,
    Seed,
    Short,
    Some,
    Steps,
    StepSize,
    Text,
    Whole,
)
from advml.names import CorruptionName, RegimeName, SchemeName


class EvaluationAttack(Section):
    """The attacks of `evaluate`, at epsilon and at half of it. Without `epsilon`: that of training."""

    epsilon: Epsilon | None = None
    batch_size: Batch
    steps: Steps
    step_size: StepSize | None = None
    restarts: Repeats
    random_start: bool
    objective: Literal["ce", "margin", "dlr"]  # of the attack on the classifier
    momentum: Annotated[Number, Field(ge=0, le=10)]  # share of the earlier directions in a step; 0: none
    schedule: Literal["constant", "linear", "cosine"]  # of the step size
    keep: Literal["best", "last"]
    adversarial_images: Images | None = None  # test images whose adversarial examples are stored; None: all
    seed: Seed = 0


class WorstCase(Section):
    """The attacks behind `accuracy/worst_case`, each aimed at what threat models I and II and those before it have left standing."""

    attacks: Annotated[tuple[Literal["pgd-margin", "apgd-ce", "apgd-t", "fab-t", "square"], ...], Short, Distinct]
    restarts: Repeats  # of pgd-margin, whose steps are those of `evaluate`
    steps: Steps  # of APGD and FAB-T
    targets: Annotated[Whole, Field(ge=1, le=10_000)]  # other classes that APGD-T and FAB-T aim at, as far as there are so many
    queries: Annotated[Whole, Field(ge=1, le=10**6)]  # that Square tries; those that change nothing are not put to the model


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


# Attack that looks for the nearest adversarial example -> norms that it works in; how, says `attacks.minimum_norm`.
MINIMAL_NORMS = {"fmn": ("linf", "l2"), "ddn": ("l2",), "cw": ("l2",)}


class Diagnostics(Section):
    """Probes for gradient masking on the first test images; their findings are flags beside the figures."""

    images: Annotated[Whole, Field(ge=0, le=10**9)]  # 0: no diagnostics
    steps: Steps
    shares: Annotated[tuple[Annotated[Number, Field(ge=1e-3, le=1000)], ...], Short, Distinct]  # of epsilon, for the security curve
    minimal: Literal["fmn", "ddn", "cw"] | None = None
    minimal_steps: Steps = 100


class Corruptions(Section):
    """Common corruptions of the test images (CIFAR-C, ImageNet-C): which, and how strong."""

    names: Annotated[tuple[CorruptionName, ...], BeforeValidator(_all_or_none), Short, Distinct]
    severities: Annotated[tuple[Annotated[Whole, Field(ge=1, le=5)], ...], Field(min_length=1, max_length=5), Distinct]
    images: Images | None = None  # the first test images; None: all
    folder: Text | None = None  # of the published files, read instead; None: data/raw/CIFAR-10-C, if it is there
    seed: Seed = 0


_MODEL = rf"({'|'.join(get_args(SchemeName))})-({'|'.join(get_args(RegimeName))})-s[0-9]{{1,10}}"
Source = Annotated[str, Field(pattern=rf"^(own|{_MODEL})$", description="own, or a model's name, e.g. CL-AT-s0")]


class Similarity(Section):
    """What `represent` and `compare` measure, on the images whose adversarial examples `evaluate` has stored."""

    layers: Annotated[tuple[Text, ...], BeforeValidator(_one_or_many), Some]  # blocks, all, or patterns of names
    batch_size: Annotated[Whole, Field(ge=4, le=2**20)]
    gram: Literal["float32", "bfloat16"] = "float32"
    epsilon_studies: Text | None = None  # folders of studies that differ in the training epsilon alone, a pattern: for claim 6
    source: Source = "own"  # whose adversarial images `compare` shows to all models; own: each model's own
    probe_images: Images | None = None  # training images of the linear probes; None: all
    probe_strengths: Annotated[tuple[Annotated[Number, Field(ge=1e-9, le=1e9)], ...], Some, Distinct]  # inverse penalties to choose from
