"""Random valid configurations of tiny studies: what the configuration and the data accept runs through every stage.

A few run in the suite. Two hundred: `ADVML_STUDIES=200 python -m pytest -n 2 tests/test_random_studies.py`.
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from advml import config
from advml.config.presets import preset
from advml.core.errors import UserError

Draw = Callable[[random.Random], Any]
COUNT = int(os.environ.get("ADVML_STUDIES", "0"))
SEEDS = range(COUNT) if COUNT else (6, 8)  # in the suite, two that take a few seconds
PHASES = ("pretrain.SL", "pretrain.CL", "pretrain.SCL", "pretrain.EMP", "regimes.ST", "regimes.AT", "regimes.Partial-AT", "regimes.Full-AT")


def one_of(*values: Any) -> Draw:
    return lambda rng: rng.choice(values)


def between(low: float, high: float) -> Draw:
    return lambda rng: rng.uniform(low, high)


def log(low: float, high: float) -> Draw:
    return lambda rng: low * (high / low) ** rng.random()


def whole(low: int, high: int) -> Draw:
    return lambda rng: rng.randint(low, high)


def some(values: tuple[Any, ...], fewest: int = 0) -> Draw:
    return lambda rng: rng.sample(values, rng.randint(fewest, len(values)))


def maybe(draw: Draw, otherwise: Any = None) -> Draw:
    return lambda rng: draw(rng) if rng.random() < 0.5 else otherwise


def pair(low: float, high: float) -> Draw:
    return lambda rng: sorted(rng.uniform(low, high) for _ in range(2))


VIEW: dict[str, Draw] = {
    "rotation": maybe(between(0, 360), 0),
    "scale": maybe(pair(0.01, 100), [1, 1]),
    "shift": maybe(between(0, 1), 0),
    "pad": maybe(whole(0, 7), 0),
    "resized_crop": maybe(pair(1e-4, 1)),
    "flip": between(0, 1),
    "brightness": maybe(between(0, 100), 0),
    "contrast": maybe(between(0, 100), 0),
    "saturation": maybe(between(0, 100), 0),
    "hue": maybe(between(0, 0.5), 0),
    "jitter": between(0, 1),
    "grey": between(0, 1),
}
PHASE: dict[str, Draw] = {
    "epochs": one_of(1, 1, 1, 2),
    "batch_size": one_of(2, 8, 16, 32, 2**20),
    "optimizer": one_of("adamw", "adam", "sgd"),
    "learning_rate": log(1e-30, 1e-2),
    "weight_decay": maybe(log(1e-6, 10), 0),
    "schedule": one_of("constant", "cosine", "onecycle"),
    "warmup": maybe(between(0, 1), 0),
    "layer_decay": maybe(log(1e-4, 1), 1),
    "label_smoothing": maybe(between(0, 0.99), 0),
    "loss": one_of("two-term", "trades"),
    "adversarial_weight": maybe(log(1e-3, 10), 1),
    "epsilon": maybe(log(1e-6, 1)),
    "epsilon_warmup": maybe(between(0, 1), 0),
    "attack_steps": maybe(whole(1, 2)),
    "frozen_statistics": one_of(True, False),
    "gradient_clip": maybe(log(1e-9, 1e9)),
    "clean_weight": maybe(log(1e-3, 10), 1),
    "weight_annealing": maybe(whole(1, 3)),
    "attacked": one_of(None, "image", "views"),
    "attack_kind": one_of(None, None, "pgd", "free", "fast"),
    "views": maybe(whole(2, 4)),
    "view_annealing": maybe(whole(1, 3)),
    "averaged_crops": one_of(1, 5),
    "average": one_of("none", "ema", "swa"),
    "average_decay": between(0.1, 0.999),
    "average_start": between(0, 0.99),
    "keep": one_of("best", "last"),
}
DRAWN: dict[str, Draw] = {
    "seeds": lambda rng: [rng.choice((0, 7, 2**31 - 1))],
    "grid.schemes": one_of(["SL"], ["CL"], ["SCL"], ["SL", "SCL"], ["SCL", "CL"], ["EMP"]),
    "grid.standard_regimes": some(("ST",)),
    "grid.adversarial_regimes": one_of([], [], ["AT"], ["Partial-AT"], ["Full-AT"], ["AT", "Full-AT"]),
    "data.name": one_of("digits", "folder"),
    "data.image_size": one_of(8, 10, 13),
    "data.channels": one_of(None, 1, 3),
    "data.validation": between(0, 0.5),
    "data.test": between(0, 0.5),
    "data.max_train": whole(20, 40),
    "data.max_test": whole(10, 20),
    "data.skip_corrupt": one_of(True, False),
    "data.layout": one_of("auto", "classes"),
    "data.duplicates": one_of("keep", "drop"),
    "data.white_level": maybe(log(1, 2**32)),
    "data.seed": one_of(0, 1, 2**31 - 1),
    "model.backbone": one_of("test_resnet", "test_efficientnet"),
    "model.stem": one_of("small", "native"),
    "model.options": one_of({}, {"drop_path_rate": 0.1}, {"act_layer": "silu"}),
    "model.projection_size": one_of(1, 2, 16, 100),
    "model.normalize_logits": one_of(True, False),
    "model.batch_norm": one_of("single", "dual"),
    "temperature": log(1e-4, 1e4),
    **{f"views.{kind}.{key}": draw for kind in ("supervised", "contrastive") for key, draw in VIEW.items()},
    "threat_model.norm": one_of("linf", "l2"),
    "threat_model.epsilon": log(1e-6, 1),
    "attack.kind": one_of("pgd", "pgd", "free", "fast"),
    "attack.steps": whole(1, 2),
    "attack.step_size": maybe(log(1e-12, 1e4)),
    "attack.random_start": one_of(True, True, False),
    "attack.batch_norm": one_of("eval", "train"),
    **{f"{phase}.{key}": draw for phase in PHASES for key, draw in PHASE.items()},
    "evaluate.epsilon": maybe(log(1e-6, 1)),
    "evaluate.batch_size": one_of(1, 7, 2**20),
    "evaluate.steps": whole(1, 3),
    "evaluate.step_size": maybe(log(1e-12, 1e4)),
    "evaluate.restarts": whole(1, 2),
    "evaluate.random_start": one_of(True, False),
    "evaluate.objective": one_of("ce", "margin", "dlr"),
    "evaluate.momentum": maybe(between(0, 10), 0),
    "evaluate.schedule": one_of("constant", "linear", "cosine"),
    "evaluate.keep": one_of("best", "last"),
    "evaluate.adversarial_images": maybe(whole(1, 20)),
    "evaluate.seed": one_of(0, 2**31 - 1),
    "worst_case.attacks": some(("pgd-margin", "apgd-ce", "apgd-t", "fab-t", "square")),
    "worst_case.restarts": whole(1, 2),
    "worst_case.steps": whole(1, 2),
    "worst_case.targets": one_of(1, 2, 10_000),
    "worst_case.queries": whole(1, 4),
    "diagnostics.images": one_of(0, 1, 5, 10**9),
    "diagnostics.steps": whole(1, 2),
    "diagnostics.shares": some((1e-3, 0.25, 1, 2, 1000)),
    "diagnostics.minimal_steps": whole(1, 3),
    "corruptions.names": some(("fog", "pixelate", "jpeg_compression", "gaussian_noise", "elastic_transform")),
    "corruptions.severities": some((1, 3, 5), 1),
    "corruptions.images": maybe(whole(1, 12)),
    "corruptions.seed": one_of(0, 2**31 - 1),
    "similarity.layers": one_of("blocks", "all", "*conv*"),
    "similarity.batch_size": one_of(4, 5, 2**20),
    "similarity.gram": one_of("float32", "bfloat16"),
    "similarity.source": one_of("own", "own", "own", "SL-AT-s0", "CL-Partial-AT-s7", "SCL-Full-AT-s0"),
    "similarity.probe_images": maybe(whole(1, 60)),
    "similarity.probe_strengths": some((1e-9, 0.1, 1, 1e9), 1),
    "tracking.experiment": one_of("advml", "a study: #1 / \u00e4 ' \"", "x" * 250),
    "runtime.device": one_of("auto", "cpu"),
    "runtime.precision": one_of("fp32", "fp32", "fp32", "bf16"),
    "runtime.micro_batch": one_of(None, None, 1, 7),
    "runtime.deterministic": one_of(True, False),
    "similarity.measures": one_of(["cka"], ["cka"], ["cka", "procrustes", "rsa"]),
}
FIXED = {  # needed as they are for a tiny study, or without a part in the stages
    "data.path": None,  # set with data.name
    "data.label_budget": 1,  # probes want every class among a few training images
    "data.unlabelled": False,  # the photos have labels
    "model.init": None,
    "runtime.threads": 1,
    "runtime.compile": False,  # needs a compiler
    "tracking.uri": None,
    "corruptions.folder": None,
    "similarity.epsilon_studies": None,
    "diagnostics.minimal": None,  # needs foolbox
}


@pytest.fixture(scope="session")
def template() -> dict[str, Any]:
    """Every scheme has a section."""
    raw = config.apply(preset("digits"), ())
    raw["pretrain"]["EMP"] = raw["pretrain"]["CL"]
    return raw


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 20 noisy pictures, of several sizes."""
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, name in enumerate(("ash", "birch", "cedar")):
        (folder / name).mkdir()
        for number in range(20):
            pixels = noise.integers(0, 120, (9 + number % 4, 10, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def drawn(seed: int, template: dict[str, Any], photos: Path) -> config.Config:
    """A valid configuration; draws that the configuration refuses are drawn again."""
    rng = random.Random(seed)
    base = config.validate(template)
    for _ in range(1000):
        values = {key: draw(rng) for key, draw in DRAWN.items()} | FIXED
        for phase in PHASES:
            values |= {f"{phase}.{name}": config.Phase.model_fields[name].default for name in config.WITHOUT_EFFECT[phase]}
        kinds = {phase: values[f"{phase}.attack_kind"] or values["attack.kind"] for phase in PHASES}
        values["attack.random_start"] |= "fast" in kinds.values()
        values["attack.batch_norm"] = "eval" if "free" in kinds.values() else values["attack.batch_norm"]
        for phase in PHASES:
            weights = {f"{phase}.clean_weight": 1, f"{phase}.adversarial_weight": 1}
            values |= weights if values[f"{phase}.weight_annealing"] else {}
            values |= weights | {f"{phase}.loss": "two-term", f"{phase}.weight_annealing": None} if kinds[phase] == "free" else {}
            values[f"{phase}.warmup"] = 0 if values[f"{phase}.schedule"] == "onecycle" else values[f"{phase}.warmup"]
            values[f"{phase}.loss"] = values[f"{phase}.loss"] if values["attack.random_start"] else "two-term"
        values["data.path"] = str(photos) if values["data.name"] == "folder" else None
        try:
            return config.changed(base, values)
        except UserError:
            continue
    raise AssertionError("nothing that is drawn is valid")


def test_every_key_is_drawn_or_fixed(template: dict[str, Any]) -> None:
    keys = {
        key
        for key in config.flatten(config.validate(template).model_dump(mode="json"))
        if not key.startswith(("tune.", "model.options.", "cluster."))
    }
    assert keys - {"model.options"} == DRAWN.keys() - {"model.options"} | FIXED.keys()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_configuration_that_is_accepted_runs_through_every_stage(
    seed: int, template: dict[str, Any], photos: Path, empty_store: Path, tmp_path: Path
) -> None:
    from advml.core.paths import Workspace
    from advml.pipeline.context import Context
    from advml.pipeline.plans import pretraining
    from advml.pipeline.stages import compare, evaluate, finetune, prepare, pretrain, report, represent, transfer
    from advml.recipes import REGIMES

    configuration = drawn(seed, template, photos)
    print(config.dump(configuration))  # shown where it fails
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    context, grid = Context(configuration, Workspace(tmp_path)), configuration.grid
    (number,) = configuration.seeds
    prepare.run(context)
    try:
        pretraining(configuration, context.dataset, scheme=grid.schemes[0], phase="st", seed=number)  # what comes before all training
    except UserError as refused:
        assert COUNT, "a study of the suite must run; choose another seed"
        pytest.skip(f"refused before the first training: {refused}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries remark on loaders and layouts that a study of thirty images does not fill
        for scheme in grid.schemes:
            for phase in {REGIMES[regime].pretraining for regime in grid.regimes}:
                pretrain.run(context, scheme=scheme, phase=phase, seed=number)
            for regime in grid.regimes:
                for stage in (finetune, evaluate, represent):
                    stage.run(context, scheme=scheme, regime=regime, seed=number)
        compare.run(context)
        transfer.run(context)
        assert report.run(context)
