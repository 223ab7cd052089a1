"""The best model of a study in the registry, loaded through MLflow."""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from advml.core.errors import UserError
from advml.core.paths import Workspace, find_model
from advml.models import export
from advml.models.network import Architecture, build, load_classifier, save
from advml.pipeline.checkpoint_export import export_model

ARCHITECTURE = Architecture("test_resnet", "small", {}, 1, 8, (0.3,), (0.4,), 3, None, False, False)
SCORES = {"CL-AT-s0": None, "CL-Partial-AT-s0": 0.7, "CL-Full-AT-s0": 0.8}


@pytest.fixture
def study(project):
    """Three models with weights, and the table of a report."""
    project.write_model("CL-at-s0", "pretrain", digest="a" * 64)
    for name, score in SCORES.items():
        folder = project.write_model(name, "model", digest="", pretraining={"name": "CL-at-s0", "digest": "a" * 64})
        record = json.loads((folder / "model.json").read_text()) | {"epoch": 2, "classes": list("abc"), "input": [1, 8, 8]}
        save(build(ARCHITECTURE, seed=len(name)), folder, record)
        set_score(project, name, score)
    (project.root / "reports" / "summary.csv").write_text("\n".join(["model", *SCORES]))
    return project


def set_score(project, name: str, score: float | None) -> None:
    """Curves whose kept epoch has this score, and another a higher one."""
    epochs = [{"epoch": epoch, "train/loss": 1.0} for epoch in (1, 2)]
    for epoch, value in zip(epochs, (0.99, score), strict=True):
        epoch |= {} if score is None else {"validation/adversarial_accuracy": value}
    (project.root / "reports" / name / "history.json").write_text(json.dumps(epochs))


def best(project):
    return project.store.client.get_model_version_by_alias("advml", "best")


def test_the_best_on_attacked_validation_images_is_registered_once_and_the_alias_follows(study):
    study.sync()
    first = best(study)
    assert first.run_id == study.newest("CL-Full-AT-s0").info.run_id and "CL-Full-AT-s0" in first.description
    study.sync()
    assert len(study.store.client.search_model_versions("name = 'advml'")) == 1
    set_score(study, "CL-Partial-AT-s0", 0.9)
    study.sync()
    assert best(study).run_id == study.newest("CL-Partial-AT-s0").info.run_id and best(study).version != first.version
    model = study.store.client.get_logged_model(study.newest("CL-Partial-AT-s0").data.tags["advml.model_id"])
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "advml", "version": 2}]


@pytest.mark.parametrize("own", [{"epsilon": 0.05}, {"attack_steps": 1}])
def test_a_model_that_was_validated_under_an_attack_of_its_own_is_no_candidate(study, own):
    path = study.root / "models" / "finetune" / "CL-Full-AT-s0" / "model.json"
    record = json.loads(path.read_text())
    record["parameters"]["regimes"] = {"Full-AT": {"epochs": 5} | own}
    path.write_text(json.dumps(record))
    study.sync()
    assert best(study).run_id == study.newest("CL-Partial-AT-s0").info.run_id


def test_a_pretraining_that_was_made_anew_scores_no_model_of_before(study):
    set_score(study, "CL-at-s0", 0.95)
    (study.root / "reports" / "CL-AT-s0" / "history.json").write_text("[]")  # as of a scheme that pretrains its classifier
    study.write_model("CL-at-s0", "pretrain", digest="b" * 64, epoch=2)
    set_score(study, "CL-at-s0", 0.95)
    study.sync()
    assert best(study).run_id == study.newest("CL-Full-AT-s0").info.run_id


@pytest.fixture
def load_registered(study, monkeypatch):
    """As a user's own process would load it, with the store in MLFLOW_TRACKING_URI."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow, on its own type hints
        pyfunc = importlib.import_module("mlflow.pyfunc")
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", study.place.uri)
    monkeypatch.setattr("mlflow.tracking._model_registry.utils._registry_uri", study.place.uri)
    return pyfunc.load_model


IMAGES = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32)


def logits_of(folder) -> np.ndarray:
    with torch.inference_mode():
        return load_classifier(folder).eval()(torch.from_numpy(IMAGES)).numpy()


def test_a_registered_model_loads_through_mlflow_by_path_and_digest(study, load_registered):
    study.sync()
    folder = study.root / "models" / "finetune" / "CL-Full-AT-s0"
    np.testing.assert_array_equal(load_registered("models:/advml@best").predict(IMAGES), logits_of(folder))
    assert not [path for path in (study.root / "mlruns").rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="dvc pull models/finetune/CL-Full-AT-s0"):
        load_registered("models:/advml@best")


@pytest.mark.parametrize("synced", [True, False])
@pytest.mark.parametrize(("name", "alias"), [("CL-Full-AT-s0", "CL-Full-AT-s0"), ("best", "model-best")])
def test_an_exported_model_is_registered_once_under_its_name_and_loads_without_the_study(
    study, load_registered, monkeypatch, synced, name, alias
):
    monkeypatch.setattr(export, "to_onnx", lambda *of: None)
    if name == "best":  # of another alias
        save(build(ARCHITECTURE, seed=1), study.root / "models" / "imported" / name, {"name": name, "kind": "imported", "input": [1, 8, 8]})
    if synced:
        study.sync()
    made = [export_model(Workspace(study.root), name, place=study.place) for _ in range(2)]
    assert [one.registered for one in made] == [f"models:/advml@{alias}"] * 2
    versions = study.store.client.search_model_versions("name = 'advml'")
    assert len(versions) == 1 + (synced and name == "best")  # that of the best model is used again
    folder = find_model(Workspace(study.root), name)
    expected = logits_of(folder)
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(load_registered(made[0].registered).predict(IMAGES), expected)
    if synced:
        assert best(study).run_id == study.newest("CL-Full-AT-s0").info.run_id


def test_an_encoder_is_exported_and_not_registered(study, monkeypatch):
    folder = study.root / "models" / "pretrain" / "CL-at-s0"
    save(build(replace(ARCHITECTURE, classes=None), seed=1), folder, json.loads((folder / "model.json").read_text()))
    assert export_model(Workspace(study.root), "CL-at-s0", place=study.place).registered is None
    assert not study.store.client.search_registered_models()


def test_a_store_that_does_not_work_costs_a_line_and_no_export(study, monkeypatch, capfd):
    monkeypatch.setattr(export, "to_onnx", lambda *of: None)
    made = export_model(Workspace(study.root), "CL-AT-s0", place=study.having("tracking.uri=http://127.0.0.1:9").place)
    assert made.registered is None and made.files == ("config.json", "model.safetensors")
    assert "not registered" in capfd.readouterr().err
