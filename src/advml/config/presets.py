"""Presets of params.yaml: digits, smoke, semi_supervised, cifar10, cifar100, folder.

    >>> print(preset("cifar10", protocol="paper"))

A preset lists the values that its study chooses, by dotted key; comments and order come from the schema. The params.yaml of the
repository is `preset("digits")`; those of pipelines/smoke and pipelines/semi_supervised are the presets of these names. To add one, add
a row to PRESETS.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from advml.config.loading import parse_override, put, validate
from advml.config.writing import write
from advml.core.errors import UserError
from advml.recipes import REGIMES


@dataclass(frozen=True)
class Preset:
    """A preset: first line of the file, values by dotted key, and comments that replace those of the schema."""

    title: str
    values: dict[str, Any]
    remarks: dict[str, str] = field(default_factory=dict)


HEADER = """\
# Keys that are missing here have neutral defaults; `advml preset {command} --full` prints all keys with their meanings.
# Change a key and run `dvc repro`: only the stages that depend on it run again. For one command: `advml train CL AT -S temperature=0.1`;
# with `dvc exp run`, a key that is missing here needs a plus: `-S +evaluate.restarts=5`. Numbers may be fractions (8/255).
# The next line is for editors; in a new study first: `advml schema > params.schema.json`.
# yaml-language-server: $schema=params.schema.json

"""

HEADS = ("regimes.ST", "regimes.AT", "regimes.Partial-AT")
HYBRIDS = ("CLxSL", "CLxSCL", "SCLxSL")
PHASES = ("pretrain.SL", "pretrain.CL", "pretrain.SCL", *(f"regimes.{name}" for name in REGIMES))  # the paper's phases


def _phase(*sections: str, **values: Any) -> dict[str, Any]:
    """Values of one training phase, repeated for several sections."""
    return {section: dict(values) for section in sections}


SIMCLR = {"flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter": 0.8, "grey": 0.2}
SGD = {"optimizer": "sgd", "weight_decay": 5e-4}
ADAMW = {"optimizer": "adamw", "weight_decay": 0.01}
HEAD = {"optimizer": "adamw", "weight_decay": 0.0, "schedule": "cosine"}
GREY_LEVELS = "eight grey levels of 255; images live in [0, 1]"

# Values common to all studies: what is trained, measured and searched, without durations and strengths.
COMMON = {
    "seeds": [0],
    "grid": {"schemes": ["SL", "CL", "SCL"], "standard_regimes": ["ST"], "adversarial_regimes": ["AT", "Partial-AT", "Full-AT"]},
    "threat_model.norm": "linf",
    "worst_case.attacks": ["pgd-margin", "apgd-ce", "apgd-t", "fab-t", "square"],
    "diagnostics": {"images": 100, "steps": 20, "shares": [0.25, 0.5, 1, 2, 4]},
    "corruptions": {"names": "all", "severities": [1, 2, 3, 4, 5]},
    "similarity.probe_strengths": [0.01, 0.1, 1],
    "tune.attack": {
        "trials": 60,
        "batch_size": 30,
        "space": {
            "step_size": {"log": [0.02, 2]},
            "schedule": {"choice": ["constant", "linear", "cosine"]},
            "momentum": {"float": [0, 1]},
            "objective": {"choice": ["ce", "margin", "dlr"]},
            "restarts": {"choice": [1, 2, 4]},
            "random_start": {"choice": [True, False]},
        },
    },
    "tune.finetune": {"trials": 30, "confirm": 3},
    "tune.pretrain": {"trials": 30},
    "tracking.experiment": "advml",
}

DIGITS = COMMON | {
    "data": {"name": "digits", "validation": 0.1, "test": 0.2},
    "model": {"backbone": "test_resnet", "stem": "small"},
    "temperature": 0.2,
    "views.supervised": {"rotation": 15, "scale": [0.9, 1.1], "shift": 0.1},
    "views.contrastive": {"rotation": 20, "scale": [0.8, 1.2], "shift": 0.15, "brightness": 0.4},
    "threat_model.epsilon": 0.15,
    "attack.steps": 5,
    **_phase("pretrain.SL", epochs=15, batch_size=128, **ADAMW, learning_rate=4e-3, schedule="onecycle"),
    **_phase("pretrain.CL", "pretrain.SCL", epochs=40, batch_size=128, **ADAMW, learning_rate=4e-3, schedule="onecycle"),
    **_phase(*HEADS, epochs=20, batch_size=128, **HEAD, learning_rate=1e-2),
    **_phase("regimes.Full-AT", epochs=10, batch_size=128, **ADAMW, learning_rate=2e-3, schedule="onecycle"),
    "evaluate": {"batch_size": 512, "steps": 20},
    "worst_case.restarts": 3,
    "worst_case.steps": 30,
    "worst_case.targets": 3,
    "worst_case.queries": 100,
    "similarity.layers": "all",
    "similarity.batch_size": 30,
    "tune.finetune.clean_floor": 0.97,
    "tune.finetune.space": {
        "learning_rate": {"log": [5e-4, 2e-2]},
        "weight_decay": {"choice": [0.0, 1e-4, 1e-3, 0.01, 0.1]},
        "epochs": {"int": [5, 15]},
        "loss": {"choice": ["two-term", "trades"]},
        "adversarial_weight": {"log": [0.5, 8]},
        "epsilon": {"float": [0.1, 0.25]},
        "epsilon_warmup": {"float": [0, 0.5]},
        "attack_steps": {"int": [3, 10]},
        "label_smoothing": {"float": [0, 0.2]},
        "layer_decay": {"log": [0.5, 1]},
        "frozen_statistics": {"choice": [False, True]},
    },
    "tune.pretrain.clean_floor": 0.95,
    "tune.pretrain.space": {
        "learning_rate": {"log": [1e-3, 2e-2]},
        "temperature": {"log": [0.05, 0.5]},
        "view.rotation": {"float": [5, 30]},
        "view.shift": {"float": [0.05, 0.3]},
        "adversarial_weight": {"log": [0.5, 4]},
        "epsilon": {"float": [0.1, 0.25]},
    },
    "runtime.threads": 1,
}

# A third of the time: free adversarial training, a smaller grid and cascade. docs/results.md has what it keeps.
QUICK_DIGITS = DIGITS | {
    "grid": {"schemes": ["SL", "CL", "SCL"], "standard_regimes": ["ST"], "adversarial_regimes": ["AT", "Full-AT"]},
    "attack.kind": "free",
    "pretrain.CL.epochs": 25,
    "pretrain.SCL.epochs": 25,
    "regimes.Full-AT.epochs": 15,
    "evaluate.steps": 10,
    "worst_case.attacks": ["pgd-margin", "apgd-t"],
    "worst_case.restarts": 1,
    "worst_case.steps": 10,
    "worst_case.targets": 2,
    "diagnostics.images": 30,
    "diagnostics.steps": 10,
    "diagnostics.shares": [0.5, 1, 2],
    "corruptions": {"names": "all", "severities": [3]},
    "similarity.layers": "blocks",
    "similarity.probe_strengths": [0.1],
    "tracking.experiment": "quick",
}

QUICK_REMARKS = {"attack.kind": "free: a batch is replayed, and each replay moves weights and perturbation"}

# Every kind of stage in about a minute: SL and CL under AT and Full-AT, with a hundredth of the gradient steps.
SMOKE = DIGITS | {
    "grid": {"schemes": ["SL", "CL"], "standard_regimes": [], "adversarial_regimes": ["AT", "Full-AT"]},
    "data.max_train": 300,
    "data.max_test": 100,
    "attack.steps": 2,
    **{f"{phase}.epochs": 2 for phase in DIGITS if phase.startswith(("pretrain.", "regimes."))},
    "evaluate.steps": 4,
    "worst_case.steps": 3,
    "worst_case.targets": 2,
    "worst_case.queries": 20,
    "diagnostics.images": 20,
    "diagnostics.steps": 4,
    "corruptions": {"names": ["gaussian_noise", "fog"], "severities": [1, 5], "images": 50},
    "tune.attack.space.restarts": {"choice": [1, 2]},  # evaluate.steps allows no more
    "tracking.experiment": "smoke",
}

# A tenth of the labels: SL trains on these alone, CL on all images, the hybrids on both. With batches of 32, three times as many epochs on
# 126 images give the number of steps of the digits study.
SEMI_SUPERVISED = DIGITS | {
    "grid": {"schemes": ["SL", "CL", *HYBRIDS], "standard_regimes": ["ST"], "adversarial_regimes": ["AT", "Full-AT"]},
    "data.label_budget": 0.1,
    **_phase("pretrain.SL", epochs=45, batch_size=32, **ADAMW, learning_rate=4e-3, schedule="onecycle"),
    **_phase(*HEADS, epochs=60, batch_size=32, **HEAD, learning_rate=1e-2),
    **_phase("regimes.Full-AT", epochs=30, batch_size=32, **ADAMW, learning_rate=2e-3, schedule="onecycle"),
    **_phase(*(f"pretrain.{name}" for name in HYBRIDS), epochs=40, batch_size=128, **ADAMW, learning_rate=4e-3, schedule="onecycle"),
    "tracking.experiment": "semi_supervised",
}

# AutoAttack's standard strength, under either protocol.
STRICT = {"worst_case.restarts": 5, "worst_case.steps": 100, "worst_case.targets": 9, "worst_case.queries": 5000}


def _searched(*, finetune: dict[str, Any], pretrain: dict[str, Any], floor: float) -> dict[str, Any]:
    """Sections of `advml tune` for the larger studies, with search ranges that depend on the optimiser."""
    threat = {"adversarial_weight": {"log": [0.5, 8]}, "epsilon": {"float": ["4/255", "12/255"]}}
    return {
        "tune.finetune.clean_floor": floor,
        "tune.finetune.space": finetune | threat | {"attack_steps": {"int": [3, 10]}, "label_smoothing": {"float": [0, 0.2]}},
        "tune.pretrain.clean_floor": floor,
        "tune.pretrain.space": pretrain | {"temperature": {"log": [0.05, 0.5]}} | threat,
    }


WEIGHT_DECAY = {"choice": [0.0, 1e-4, 5e-4, 1e-3, 0.01]}
LARGER = (
    COMMON
    | STRICT
    | {
        "temperature": 0.2,
        "threat_model.epsilon": "8/255",
        "attack.steps": 5,
        "evaluate": {"batch_size": 512, "steps": 20, "adversarial_images": 2000},
        "corruptions.images": 2000,
        "similarity.layers": "blocks",
        "similarity.batch_size": 100,
        "similarity.probe_images": 10000,
        "runtime.threads": 0,
    }
)
CIFAR = LARGER | {
    "data": {"validation": 0.1, "test": 0.2},
    "model": {"backbone": "resnet18", "stem": "small"},
    "views.supervised": {"pad": 4, "flip": 0.5},
    "views.contrastive": {"resized_crop": [0.2, 1.0], **SIMCLR},
    # SGD for cross-entropy: the settings that Pang et al. (2021, "Bag of tricks for adversarial training") recommend.
    **_phase("pretrain.SL", epochs=100, batch_size=128, **SGD, learning_rate=0.1, schedule="cosine", warmup=0.05),
    **_phase("pretrain.CL", "pretrain.SCL", epochs=200, batch_size=512, **ADAMW, learning_rate=1e-3, schedule="cosine", warmup=0.05),
    **_phase(*HEADS, epochs=25, batch_size=512, **HEAD, learning_rate=1e-3),
    **_phase("regimes.Full-AT", epochs=25, batch_size=128, **SGD, learning_rate=0.05, schedule="cosine", warmup=0.1),
    **_searched(
        finetune={"learning_rate": {"log": [0.005, 0.2]}, "weight_decay": WEIGHT_DECAY, "epochs": {"int": [10, 40]}},
        pretrain={"learning_rate": {"log": [1e-4, 1e-2]}},
        floor=0.75,
    ),
}
CIFAR_REMARKS = {
    "data.validation": "share of the training images",
    "data.test": "not used: CIFAR comes with a test split",
    "threat_model.epsilon": GREY_LEVELS,
}

FOLDER = LARGER | {
    "data": {
        "name": "folder",
        "path": "photos",
        "image_size": 64,
        "validation": 0.1,
        "test": 0.2,
        "max_train": None,
        "skip_corrupt": False,
    },
    "model": {"backbone": "resnet18", "stem": "native"},
    "views.supervised": {"resized_crop": [0.5, 1.0], "flip": 0.5},
    "views.contrastive": {"resized_crop": [0.2, 1.0], **SIMCLR},
    **_phase("pretrain.SL", epochs=20, batch_size=128, **ADAMW, learning_rate=1e-3, schedule="onecycle"),
    **_phase("pretrain.CL", "pretrain.SCL", epochs=40, batch_size=128, **ADAMW, learning_rate=1e-3, schedule="onecycle"),
    **_phase(*HEADS, epochs=20, batch_size=128, **HEAD, learning_rate=3e-3),
    **_phase("regimes.Full-AT", epochs=10, batch_size=128, **ADAMW, learning_rate=5e-4, schedule="onecycle"),
    **_searched(
        finetune={"learning_rate": {"log": [1e-4, 5e-3]}, "weight_decay": WEIGHT_DECAY, "epochs": {"int": [5, 20]}},
        pretrain={"learning_rate": {"log": [1e-4, 1e-2]}},
        floor=0.5,
    ),
}
FOLDER_REMARKS = {
    "data.path": "1. folder of your images: photos/cats/1.jpg, or photos/{train,test}/cats/1.jpg",
    "data.image_size": "2. side in pixels: images are resized and cropped; twice the side costs four times the work",
    "data.max_train": "3. for a first look: 1000 images, stratified; null: all",
    "model.stem": "4. small: keeps the resolution, for images under about 64 pixels; costs 15 times the arithmetic here",
    "threat_model.epsilon": f"5. {GREY_LEVELS}",
}

PAPER = (
    COMMON
    | STRICT
    | {
        "data": {"validation": 0.01, "test": 0.2},
        "model": {"backbone": "resnet50", "stem": "small", "options": {"zero_init_last": False}, "normalize_logits": True},
        "temperature": 0.07,
        "views.supervised": {"pad": 5, "flip": 0.5},
        "views.contrastive": {"resized_crop": [0.08, 1.0], **SIMCLR},
        "threat_model.epsilon": "8/255",
        "attack": {"steps": 5, "step_size": 0.01, "random_start": False, "batch_norm": "train"},
        **_phase(
            *PHASES, epochs=200, batch_size=256, optimizer="adam", learning_rate=3e-4, weight_decay=0.0, schedule="constant", keep="last"
        ),
        "evaluate": {"batch_size": 256, "steps": 40, "step_size": 0.01, "restarts": 1, "random_start": False, "keep": "last"},
        "similarity.layers": "blocks",
        "similarity.batch_size": 256,
        "runtime.threads": 0,
        **_searched(
            finetune={"learning_rate": {"log": [1e-4, 3e-3]}, "weight_decay": WEIGHT_DECAY},
            pretrain={"learning_rate": {"log": [1e-4, 3e-3]}},
            floor=0.75,
        ),
    }
)
PAPER_REMARKS = CIFAR_REMARKS | {
    "data.validation": "for the curves only (`keep: last`): the paper trains on all of them",
    "threat_model.epsilon": "of training; the paper attacks at 4/255, half of it: read accuracy/threat_model_*_half",
    "model.options": "timm starts the last batch norm of every block at zero; the paper's network does not",
    "attack.step_size": "fixed, whatever epsilon is",
    "attack.random_start": "false: from the image, where the gradient of the positive pair is zero",
    "attack.batch_norm": "train: every step of the attack uses and updates batch statistics",
    "evaluate.step_size": "64 % of the radius of 4/255 per step: overshoots, so accuracies are too high",
    "evaluate.restarts": "one run: no restart",
}


def _cifar(key: str, name: str) -> dict[str, Preset]:
    paper = f"{name} under the protocol of arXiv 2302.02502, for comparison with its figures.\n"
    paper += "# Not reproduced by any parameter: the paper trains the heads of ST and AT on raw logits, and drops the last 16 test images."
    return {
        "corrected": Preset(f"{name}, ResNet-18, L-infinity 8/255. Meant for a GPU.", CIFAR | {"data.name": key}, CIFAR_REMARKS),
        "paper": Preset(paper, PAPER | {"data.name": key}, PAPER_REMARKS),
    }


# name -> protocol -> preset
PRESETS: dict[str, dict[str, Preset]] = {
    "digits": {"corrected": Preset("Study on scikit-learn's digits.", DIGITS)},
    "smoke": {"corrected": Preset("Every kind of stage on a few digits, in about a minute.", SMOKE)},
    "semi_supervised": {"corrected": Preset("Digits with a tenth of the labels.", SEMI_SUPERVISED)},
    "cifar10": _cifar("cifar10", "CIFAR-10"),
    "cifar100": _cifar("cifar100", "CIFAR-100"),
    "folder": {"corrected": Preset("Study on your own images. Start with the keys numbered 1 to 5.", FOLDER, FOLDER_REMARKS)},
}
PROTOCOLS = ("corrected", "paper")
QUICK = {"digits": Preset("Study on scikit-learn's digits in a third of the time.", QUICK_DIGITS, QUICK_REMARKS)}  # name -> shorter study


def preset(name: str, *, protocol: str = "corrected", quick: bool = False, overrides: Sequence[str] = (), full: bool = False) -> str:
    """Text of a preset's params.yaml, with comments.

    Args:
        name: a key of PRESETS.
        protocol: "corrected", or for CIFAR "paper": the settings of arXiv 2302.02502, flaws included.
        quick: a study of the same kind in a third of the time; a key of QUICK, under the corrected protocol.
        overrides: `key=value` strings, checked as on the command line and written into the text.
        full: write all keys, with their defaults.
    Raises:
        UserError: name or protocol are unknown, or the preset does not have this protocol.
    """
    for key, value, choices in (("preset", name, PRESETS), ("protocol", protocol, PROTOCOLS)):
        if value not in choices:
            raise UserError(f"{key} = {value!r}; choose from {', '.join(choices)}")
    if protocol not in PRESETS[name]:
        able = ", ".join(other for other, protocols in PRESETS.items() if protocol in protocols)
        raise UserError(f"preset = {name!r} has no protocol {protocol!r}; choose the preset from {able}")
    if quick and (protocol != "corrected" or name not in QUICK):
        raise UserError(f"preset = {name!r} under the {protocol} protocol has no quick study; choose the preset from {', '.join(QUICK)}")
    chosen = QUICK[name] if quick else PRESETS[name][protocol]
    raw = put({}, deepcopy(chosen.values))
    for override in overrides:
        put(raw, dict([parse_override(override)]), prefix="-S ")
    validate(raw, source=f"preset {name}", overrides=overrides)
    command = name + (" --quick" if quick else "" if protocol == "corrected" else f" --protocol {protocol}")
    header = f"# {chosen.title}\n" + HEADER.format(command=command)
    return header + write(raw, chosen.remarks, full=full)
