"""Complete, commented params.yaml files to start from: digits, cifar10, cifar100, folder.

    >>> print(preset("cifar10", protocol="paper"))

`digits.yaml`, the same text as params.yaml at the repository's root, is the template; every other preset is the
template with some values and comments replaced. To add one, add a row to PRESETS.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advml.config import NEUTRAL, apply, parse_override, validate
from advml.errors import UserError
from advml.rewrite import rewrite

HEADS = ("regimes.ST", "regimes.AT", "regimes.Partial-AT")
PHASES = ("pretrain.SL", "pretrain.CL", "pretrain.SCL", *HEADS, "regimes.Full-AT")


@dataclass(frozen=True)
class Preset:
    """What differs from the template: lines above it, and values and comments by dotted key."""

    header: str
    values: dict[str, Any]
    remarks: dict[str, str] = field(default_factory=dict)


def _phase(*sections: str, **values: Any) -> dict[str, dict[str, Any]]:
    """The same training phase, whole and in the template's order, in several sections."""
    neutral = {"warmup": 0.0, **NEUTRAL, "gradient_clip": None, "keep": "best"}
    order = ("epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "schedule", *neutral)
    return {section: {key: {**neutral, **values}[key] for key in order} for section in sections}


SIMCLR = {"flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter": 0.8, "grey": 0.2}
SGD = {"batch_size": 128, "optimizer": "sgd", "weight_decay": 5e-4}
ADAMW = {"optimizer": "adamw", "weight_decay": 0.01}
GREY_LEVELS = "eight grey levels of 255; images live in [0, 1]"
# AutoAttack's standard strength, and all that stands beside it, under either protocol.
STRICT = {
    "worst_case.restarts": 5,
    "worst_case.steps": 100,
    "worst_case.targets": 9,
    "worst_case.queries": 5000,
    "diagnostics.images": 100,
    "diagnostics.steps": 20,
    "corruptions.names": "all",
    "corruptions.severities": [1, 2, 3, 4, 5],
}
# Spelled out although the template says the same today: tuning the digits study must move nothing here.
UNTUNED = {
    "temperature": 0.2,
    "attack.steps": 5,
    "evaluate.steps": 20,
    "evaluate.restarts": 1,
    "evaluate.adversarial_images": 2000,
    **STRICT,
    "corruptions.images": 2000,
    "similarity.layers": "blocks",
    "similarity.batch_size": 100,
    "similarity.probe_images": 10000,
    "runtime.threads": 0,
}
ALL_CORES = {"runtime.threads": "0: all cores; a fixed number makes CPU results the same everywhere"}


def _searched(*, finetune: dict[str, Any], pretrain: dict[str, Any], floor: float) -> dict[str, Any]:
    """The searches of `advml tune`: what all larger studies share, and what their optimiser asks for."""
    threat = {"adversarial_weight": {"log": [0.5, 8]}, "epsilon": {"float": ["4/255", "12/255"]}}
    return {
        "tune.finetune.clean_floor": floor,
        "tune.finetune.space": finetune | threat | {"attack_steps": {"int": [3, 10]}, "label_smoothing": {"float": [0, 0.2]}},
        "tune.pretrain.clean_floor": floor,
        "tune.pretrain.space": pretrain
        | {"temperature": {"log": [0.05, 0.5]}}
        | deepcopy(threat),  # YAML would share one object by an anchor
    }


WEIGHT_DECAY = {"choice": [0.0, 1e-4, 5e-4, 1e-3, 0.01]}
CIFAR = UNTUNED | {
    "model.backbone": "resnet18",
    "views.supervised": {"pad": 4, "flip": 0.5},
    "views.contrastive": {"resized_crop": [0.2, 1.0], **SIMCLR},
    "threat_model.epsilon": "8/255",
    # SGD for cross-entropy: the settings that Pang et al. (2021, "Bag of tricks for adversarial training") recommend.
    **_phase("pretrain.SL", epochs=100, **SGD, learning_rate=0.1, schedule="cosine", warmup=0.05),
    **_phase("pretrain.CL", "pretrain.SCL", epochs=200, batch_size=512, **ADAMW, learning_rate=1e-3, schedule="cosine", warmup=0.05),
    **_phase(*HEADS, epochs=25, batch_size=512, optimizer="adamw", learning_rate=1e-3, weight_decay=0.0, schedule="cosine"),
    **_phase("regimes.Full-AT", epochs=25, **SGD, learning_rate=0.05, schedule="cosine", warmup=0.1),
    **_searched(
        finetune={"learning_rate": {"log": [0.005, 0.2]}, "weight_decay": WEIGHT_DECAY, "epochs": {"int": [10, 40]}},
        pretrain={"learning_rate": {"log": [1e-4, 1e-2]}},
        floor=0.75,
    ),
}
CIFAR_REMARKS = ALL_CORES | {
    "data.validation": "share of the training images",
    "data.test": "not used: CIFAR comes with a test split",
    "threat_model.epsilon": GREY_LEVELS,
}

FOLDER = UNTUNED | {
    "data.name": "folder",
    "data.path": "photos",
    "data.image_size": 64,
    "model.backbone": "resnet18",
    "model.stem": "native",
    "views.supervised": {"resized_crop": [0.5, 1.0], "flip": 0.5},
    "views.contrastive": {"resized_crop": [0.2, 1.0], **SIMCLR},
    "threat_model.epsilon": "8/255",
    **_phase("pretrain.SL", epochs=20, batch_size=128, **ADAMW, learning_rate=1e-3, schedule="onecycle"),
    **_phase("pretrain.CL", "pretrain.SCL", epochs=40, batch_size=128, **ADAMW, learning_rate=1e-3, schedule="onecycle"),
    **_phase(*HEADS, epochs=20, batch_size=128, optimizer="adamw", learning_rate=3e-3, weight_decay=0.0, schedule="cosine"),
    **_phase("regimes.Full-AT", epochs=10, batch_size=128, **ADAMW, learning_rate=5e-4, schedule="onecycle"),
    **_searched(
        finetune={"learning_rate": {"log": [1e-4, 5e-3]}, "weight_decay": WEIGHT_DECAY, "epochs": {"int": [5, 20]}},
        pretrain={"learning_rate": {"log": [1e-4, 1e-2]}},
        floor=0.5,
    ),
}
FOLDER_REMARKS = ALL_CORES | {
    "data.path": "1. your images: photos/cats/1.jpg, or photos/{train,test}/cats/1.jpg",
    "data.image_size": "2. side in pixels: images are resized and cropped; twice the side, four times the work",
    "data.channels": "null: RGB; 1: grey",
    "data.max_train": "3. for a first look: 1000 images, stratified; null: all",
    "data.skip_corrupt": "true: leave unreadable images out and count them; false: list them and stop",
    "model.stem": "4. small: keeps the resolution, for images under about 64 pixels; here 15 times the arithmetic",
    "threat_model.epsilon": f"5. {GREY_LEVELS}",
}

PAPER = {
    "data.validation": 0.01,
    "model.backbone": "resnet50",
    "model.stem": "small",
    "model.options": {"zero_init_last": False},
    "model.normalize_logits": True,
    "temperature": 0.07,
    "views.supervised": {"pad": 5, "flip": 0.5},
    "views.contrastive": {"resized_crop": [0.08, 1.0], **SIMCLR},
    "threat_model.epsilon": "8/255",
    "attack.steps": 5,
    "attack.step_size": 0.01,
    "attack.random_start": False,
    "attack.batch_norm": "train",
    **_phase(*PHASES, epochs=200, batch_size=256, optimizer="adam", learning_rate=3e-4, weight_decay=0.0, schedule="constant", keep="last"),
    "evaluate.batch_size": 256,
    "evaluate.steps": 40,
    "evaluate.step_size": 0.01,
    "evaluate.restarts": 1,
    "evaluate.random_start": False,
    "evaluate.keep": "last",
    "evaluate.adversarial_images": None,
    **STRICT,
    "corruptions.images": None,
    "similarity.layers": "blocks",
    "similarity.batch_size": 256,
    "similarity.probe_images": None,
    "runtime.threads": 0,
    **_searched(
        finetune={"learning_rate": {"log": [1e-4, 3e-3]}, "weight_decay": WEIGHT_DECAY},
        pretrain={"learning_rate": {"log": [1e-4, 3e-3]}},
        floor=0.75,
    ),
}
PAPER_REMARKS = CIFAR_REMARKS | {
    "data.validation": "for the curves only (`keep: last`): the paper trains on all of them",
    "threat_model.epsilon": "of training; the paper attacks at 4/255, half of it: read accuracy/threat_model_*_half",
    "model.options": "timm starts the last batch norm of every block at zero; the paper's network does not",
    "attack.step_size": "fixed, whatever epsilon is",
    "attack.random_start": "false: from the image, where the positive pair has no gradient yet",
    "attack.batch_norm": "train: batch statistics are used, and moved, by every step of the attack",
    "evaluate.step_size": "64 % of the radius of 4/255 per step: it overshoots, so figures flatter",
    "evaluate.restarts": "one run: no restart",
}

CIFAR_HEADER = """\
# {name}, ResNet-18, L-infinity 8/255: `advml preset {key}`. Meant for a GPU.
# The settings of arXiv 2302.02502, for comparison with its figures: `advml preset {key} --protocol paper`.
"""
PAPER_HEADER = """\
# {name} under the protocol of arXiv 2302.02502, for comparison with its figures: `advml preset {key} --protocol paper`.
# What no parameter brings back: there, the heads of ST and AT learn on raw logits, and the last 16 test images are dropped.
"""
FOLDER_HEADER = """\
# Your own images: `advml preset folder`. What to change first is numbered, 1 to 5; the rest can wait.
"""


def _cifar(key: str, name: str) -> dict[str, Preset]:
    dataset = {"data.name": key}
    return {
        "corrected": Preset(CIFAR_HEADER.format(key=key, name=name), CIFAR | dataset, CIFAR_REMARKS),
        "paper": Preset(PAPER_HEADER.format(key=key, name=name), PAPER | dataset, PAPER_REMARKS),
    }


# name -> protocol -> what differs from the template
PRESETS: dict[str, dict[str, Preset]] = {
    "digits": {"corrected": Preset(header="", values={})},
    "cifar10": _cifar("cifar10", "CIFAR-10"),
    "cifar100": _cifar("cifar100", "CIFAR-100"),
    "folder": {"corrected": Preset(FOLDER_HEADER, FOLDER, FOLDER_REMARKS)},
}
PROTOCOLS = ("corrected", "paper")


def preset(name: str, *, protocol: str = "corrected", overrides: Sequence[str] = ()) -> str:
    """A complete params.yaml with comments.

    Args:
        name: a key of PRESETS.
        protocol: "corrected", or for CIFAR "paper": the settings of arXiv 2302.02502, flaws included.
        overrides: `key=value` strings, checked as on the command line and written into the text.
    Raises:
        UserError: unknown name or protocol, or a protocol that the preset does not have.
    """
    for key, value, choices in (("preset", name, PRESETS), ("protocol", protocol, PROTOCOLS)):
        if value not in choices:
            raise UserError(f"{key} = {value!r}; choose from {', '.join(choices)}")
    if protocol not in PRESETS[name]:
        able = ", ".join(other for other, protocols in PRESETS.items() if protocol in protocols)
        raise UserError(f"preset = {name!r} has no protocol {protocol!r}; choose the preset from {able}")
    template = Path(__file__).with_name("digits.yaml").read_text(encoding="utf-8")
    chosen = PRESETS[name][protocol]
    if chosen.values:
        _require_phases(template, chosen.values, name)
    text = chosen.header + rewrite(template, chosen.values, chosen.remarks) if chosen.values else template
    if not overrides:
        return text
    values = dict(parse_override(override) for override in overrides)
    validate(apply(text, overrides), source=f"preset {name}", overrides=overrides)
    return rewrite(text, values, {})


def _require_phases(template: str, values: dict[str, Any], name: str) -> None:
    """Raises UserError for a phase of the template that the preset says nothing of: it would be trained with the digits' values."""
    sections = apply(template, [], source="digits.yaml")
    for key in (f"{kind}.{phase}" for kind in ("pretrain", "regimes") for phase in sections[kind]):
        if key not in values:
            raise UserError(f"preset = {name!r} has no values for {key}; add {key!r} to the phases of {__name__}")
