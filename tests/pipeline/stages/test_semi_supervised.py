"""A hybrid through all stages, and what is left of them for images without any label."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from advml.core.errors import UserError
from advml.data.datasets import save
from advml.data.prepared import Split, digest
from advml.pipeline.stages import evaluate, finetune, pretrain, report, represent, train

PHASE = "{epochs: 1, batch_size: 32, optimizer: adamw, learning_rate: 0.01, weight_decay: 0.0, schedule: cosine}"
PLAIN = ("diagnostics.images=0", "worst_case.attacks=[]", "corruptions.names=none")


def test_a_hybrid_is_trained_evaluated_represented_shown_and_reported(make_study, dataset):
    grid = ("grid.schemes=[CLxSL]", "grid.standard_regimes=[]", "grid.adversarial_regimes=[AT]")
    study = make_study("study", *PLAIN, *grid, f"pretrain.CLxSL={PHASE}")
    parts = {name: Split(dataset.train.images[some], dataset.train.labels[some]) for name, some in PARTS.items()}
    save(replace(dataset, **parts, digest=digest(dataset.splits | parts, dataset.classes)), study.workspace.prepared)
    context, name = study.context(), "CLxSL-AT-s0"
    pretrain.run(context, scheme="CLxSL", phase="at", seed=0)
    finetune.run(context, scheme="CLxSL", regime="AT", seed=0)
    metrics = evaluate.run(context, scheme="CLxSL", regime="AT", seed=0)
    represent.run(context, scheme="CLxSL", regime="AT", seed=0)
    assert {"accuracy/threat_model_1", "accuracy/threat_model_2", "accuracy/clean"} <= metrics.keys()
    model = json.loads((study.workspace.model(name) / "model.json").read_text())
    assert model["pretraining"]["name"] == "CLxSL-at-s0" and model["data"]["counts"]["unlabelled"] == 64
    assert set(model["parameters"]["views"]) == {"supervised", "contrastive"}  # a change of either makes it anew
    assert not json.loads((study.workspace.report(name) / "history.json").read_text()), "its classifier is done"
    assert [run for run, _ in study.runs()][:1] == ["CLxSL-at-s0"]
    report.run(context)
    page = (study.workspace.reports / "report.html").read_text()
    assert name in page and "supervised and contrastive (CL-SL)" in page and "64 are not" in page
    assert name in (study.workspace.reports / "summary.csv").read_text()


PARTS = {"train": slice(0, 32), "unlabelled": slice(32, 96)}


def test_a_folder_without_classes_pretrains_cl_and_nothing_that_needs_labels_begins(make_study, tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "flat").mkdir()
    for number in range(24):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "flat" / f"{number}.png")
    data = ("data.name=folder", f"data.path={tmp_path / 'flat'}", "data.image_size=8", "data.channels=1", "data.unlabelled=true")
    study = make_study("study", *PLAIN, *data, "pretrain.CL.epochs=1", "pretrain.CL.batch_size=8")
    with pytest.raises(UserError, match="fine-tuning needs labels"):
        train.run(study.context(), scheme="CL", regime="AT", seed=0)  # it has prepared the images, and trained nothing
    assert not study.workspace.pretrained("CL-at-s0").exists()
    model = pretrain.run(study.context(), scheme="CL", phase="at", seed=0)
    assert model["classes"] == [] and (study.workspace.pretrained("CL-at-s0") / "model.safetensors").is_file()
    for call in (
        lambda: pretrain.run(study.context(), scheme="SCL", phase="at", seed=0),
        lambda: finetune.run(study.context(), scheme="CL", regime="AT", seed=0),
    ):
        with pytest.raises(UserError, match="needs labels"):
            call()
