"""`represent`, `compare` and `report` on a tiny study: the contract's files, MLflow's artifacts, what holds between models."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import advml
from advml import tracking
from advml.core.errors import UserError
from advml.evaluation import records
from advml.models.external import Given
from advml.pipeline.stages import compare, evaluate, finetune, pretrain, report, represent, transfer
from advml.report import figures as drawn
from advml.report.show import record_of
from advml.tracking import results

MODELS = (("CL", "AT"), ("CL", "Partial-AT"), ("CL", "Full-AT"), ("SL", "AT"))
SMALL = ("similarity.batch_size=8", "similarity.probe_strengths=[0.1]", "similarity.layers=blocks")
PLAIN = ("diagnostics.images=0", "worst_case.attacks=[]", "corruptions.names=none")  # a second evaluation, where these are not the point


@pytest.fixture(scope="module")
def measured(new_study, tmp_path_factory, drawing):
    """Four models, evaluated, represented and compared; the curves of their training are drawn, and what there is of SL-AT-s0."""
    study = new_study(tmp_path_factory.mktemp("represent") / "study", *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_STAGE", "a stage")
        with drawing():
            for scheme in ("CL", "SL"):
                pretrain.run(study.context(), scheme=scheme, phase="at", seed=0)
        for scheme, regime in MODELS:
            with drawing():
                finetune.run(study.context(), scheme=scheme, regime=regime, seed=0)
            evaluate.run(study.context(), scheme=scheme, regime=regime, seed=0)
            with drawing() if scheme == "SL" else contextlib.nullcontext():
                represent.run(study.context(), scheme=scheme, regime=regime, seed=0)
        with drawing():
            compare.run(study.context())
    return study


@pytest.fixture
def study(measured, tmp_path):
    """A copy, for one test."""
    return measured.copy(tmp_path / "copy")


def cka(study, model: str) -> dict[str, np.ndarray]:
    with np.load(study.workspace.report(model) / "cka.npz", allow_pickle=False) as stored:
        return dict(stored)


def described(study, model: str) -> dict:
    return json.loads((study.workspace.report(model) / "cka.json").read_text())


def artifacts(study, name: str) -> dict[str, object]:
    store = study.store()
    (run,) = [run for run in store.client.search_runs([store.experiment]) if run.info.run_name == name]
    waiting, found = [""], set()
    while waiting:
        for each in store.client.list_artifacts(run.info.run_id, waiting.pop()):
            waiting.append(each.path) if each.is_dir else found.add(each.path)
    return {"files": found, "metrics": run.data.metrics, "tags": run.data.tags}


def test_the_files_are_those_of_the_contract(measured):
    arrays, about = cka(measured, "CL-AT-s0"), described(measured, "CL-AT-s0")
    count = len(about["layers"])
    for name in ("clean", "adversarial", "clean_adversarial"):
        assert arrays[name].shape == (count, count)
    for name in ("clean", "adversarial"):
        assert np.allclose(arrays[name], arrays[name].T, equal_nan=True)
        diagonal = arrays[name].diagonal()
        assert np.allclose(diagonal[np.isfinite(diagonal)], 1)
    assert about["layers"][0]["name"] == "encoder.layer1.0" and about["layers"][-1]["name"] == "classifier"
    assert about["batch_sizes"] == [8] * 5 and about["n"] == 40 and "HSIC_1" in about["estimator"]
    assert about["adversarial_source"]["model"] == "CL-AT-s0" and about["adversarial_source"]["epsilon"] == 0.15
    for figure in ("SL-AT-s0/cka.png", "SL-AT-s0/layers.png", "compare/clean.png", "compare/adversarial.png"):
        with Image.open(measured.workspace.reports / figure) as image:
            assert image.size[0] > 1000 and len(image.convert("L").getcolors()) > 50  # something is drawn


def test_rows_of_the_mixed_matrix_are_clean(measured):
    """Recomputed from the stored products: rows are normed by clean, columns by adversarial."""
    arrays = cka(measured, "SL-AT-s0")
    cross = arrays["products_clean_adversarial"].sum(0)
    expected = cross / np.sqrt(np.outer(arrays["norms_clean"].sum(0), arrays["norms_adversarial"].sum(0)))
    assert np.allclose(arrays["clean_adversarial"], expected, equal_nan=True)


def test_partial_at_leaves_the_encoder_alone(measured):
    """So its CKA on clean images is AT's exactly, head apart; on adversarial images it need not be."""
    rows = [layer["in_encoder"] for layer in described(measured, "CL-AT-s0")["layers"]]
    encoder = np.ix_(rows, rows)
    at, partial, full = (cka(measured, f"CL-{regime}-s0") for regime in ("AT", "Partial-AT", "Full-AT"))
    assert np.array_equal(at["clean"][encoder], partial["clean"][encoder], equal_nan=True)
    assert not np.array_equal(at["clean"], partial["clean"], equal_nan=True)
    assert not np.allclose(at["clean"][encoder], full["clean"][encoder], equal_nan=True)


def test_metrics_of_both_stages_stand_in_one_file(measured):
    metrics = json.loads((measured.workspace.report("CL-AT-s0") / "metrics.json").read_text())
    for name in ("accuracy/clean", "accuracy/threat_model_2", "cka/redundancy", "cka/clean_adversarial", "probe/adversarial"):
        assert metrics[f"{name}/low"] <= metrics[name] <= metrics[f"{name}/high"]
    # The probe of the last layer, on the adversarial images of the very attack that the accuracy is of.
    assert metrics["probe/clean"] == described(measured, "CL-AT-s0")["layers"][-5]["probe"]["accuracy"]["clean"]


def test_a_second_evaluation_keeps_the_metrics_of_the_representation(study):
    path = study.workspace.report("SL-AT-s0") / "metrics.json"
    before = path.read_text()
    path.unlink()
    evaluate.run(study.context(), scheme="SL", regime="AT", seed=0)
    assert path.read_text() == before


def test_metrics_of_other_weights_are_left_out(study):
    path = study.workspace.record("represent", "SL-AT-s0")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "other"}))
    digest = json.loads((study.workspace.model("SL-AT-s0") / "model.json").read_text())["digest"]
    assert not any(name.startswith("cka/") for name in records.metrics_of(study.workspace, "SL-AT-s0", digest=digest))


def test_stored_adversarial_images_are_those_that_were_counted(measured, dataset):
    """Scored by a fresh copy of the model they give the figure of threat model II; and they stay in the ball and the box."""
    found = load_file(measured.workspace.adversarial("CL-Full-AT-s0"))["images"]
    clean = dataset.test.images.float() / 255
    assert (found - clean).abs().max() <= 0.15 + 1e-6 and found.min() >= 0 and found.max() <= 1
    with torch.no_grad():
        model = advml.load_model(measured.workspace.model("CL-Full-AT-s0"))
        right = (model(found).argmax(1) == dataset.test.labels) & (model(clean).argmax(1) == dataset.test.labels)
    metrics = json.loads((measured.workspace.report("CL-Full-AT-s0") / "metrics.json").read_text())
    assert float(right.double().mean()) == metrics["accuracy/threat_model_2"]


def test_as_many_adversarial_images_are_stored_as_asked_for(study):
    before = load_file(study.workspace.adversarial("SL-AT-s0"))["images"]
    evaluate.run(study.context(*PLAIN, "evaluate.adversarial_images=13"), scheme="SL", regime="AT", seed=0)
    assert torch.equal(load_file(study.workspace.adversarial("SL-AT-s0"))["images"], before[:13])
    represent.run(study.context("similarity.batch_size=6"), scheme="SL", regime="AT", seed=0)
    about = described(study, "SL-AT-s0")
    assert about["batch_sizes"] == [6, 6] and about["left_out_of_cka"] == 1 and about["n"] == 13


@pytest.mark.parametrize("fault", ["missing", "damaged", "of other weights"])
def test_adversarial_images_that_do_not_fit_are_refused(study, fault):
    path = study.workspace.adversarial("SL-AT-s0")
    if fault == "missing":
        path.unlink()
    elif fault == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    else:
        save_file(load_file(path), path, metadata={"record": json.dumps({"model": "SL-AT-s0", "digest": "0"})})
    with pytest.raises(UserError, match=r"SL-AT-s0\.safetensors") as refused:
        represent.run(study.context(), scheme="SL", regime="AT", seed=0)
    assert "evaluate" in str(refused.value) and "\n" not in str(refused.value)


def test_the_run_carries_the_report_as_artifacts(measured):
    logged = artifacts(measured, "CL-AT-s0")
    record = json.loads(measured.workspace.record("represent", "CL-AT-s0").read_text())
    assert {name.partition("/")[0] for name in record["metrics"]} == set(results.REPRESENTATION)  # else some would never leave MLflow
    assert {"cka.png", "layers.png", "cka/cka.json", "cka/cka.npz", "records/represent/CL-AT-s0.json"} <= logged["files"]
    assert sum(path.startswith("images/cka") for path in logged["files"]) >= 1  # what the UI's image grid shows
    assert (
        logged["metrics"]["cka/redundancy"]
        == json.loads((measured.workspace.report("CL-AT-s0") / "metrics.json").read_text())["cka/redundancy"]
    )


def dump(study, *overrides: str) -> dict[str, dict]:
    """All that a store holds of a study, by the names of runs; without times, ids and processes, which are those of the store."""
    store = study.store(*overrides)
    client, records = store.client, store.client.search_runs([store.experiment])
    names = {run.info.run_id: run.info.run_name for run in records}
    found = {}
    for run in records:
        where, tags = Path(unquote(urlparse(run.info.artifact_uri).path)), dict(run.data.tags)
        model = client.get_logged_model(tags["advml.model_id"]) if "advml.model_id" in tags else None
        tags |= {key: names[tags[key]] for key in ("advml.pretraining_run",) if key in tags}
        assert run.info.run_name not in found
        found[run.info.run_name] = {
            "status": run.info.status,
            "parameters": run.data.params,
            "tags": {key: without_ids(value, names) for key, value in tags.items() if key not in OF_THE_STORE},
            "metrics": {
                key: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
                for key in run.data.metrics
            },
            "data": run.inputs.dataset_inputs and run.inputs.dataset_inputs[0].dataset.to_dictionary(),
            "parents": len(run.inputs.model_inputs),
            "model": model and (model.name, model.params, {metric.key: metric.value for metric in model.metrics or ()}),
            # the names of images have the time and an id in them
            "artifacts": sorted(
                (
                    re.sub(r"[+%]timestamp[+%]\d+[+%][0-9a-f-]{36}", "", path.relative_to(where).as_posix()),
                    hashlib.sha256(path.read_bytes()).hexdigest(),
                )
                for path in where.rglob("*")
                if path.is_file()
            ),
        }
    return found


# The files tell nothing of the stage: it would be another one, or none, when the same result is made again; nor of a study's folder.
OF_THE_STORE = ("advml.process", "advml.folder", "advml.synced", "advml.model_id", "advml.dvc_stage", "mlflow.source.name")


def without_ids(text: str, names: dict[str, str]) -> str:
    """A description links the run of the pretraining."""
    text = re.sub(r"experiments/\d+", "experiments/", text)
    return re.sub("|".join(names), lambda found: names[found.group()], text)


def test_sync_rebuilds_from_files_what_the_stages_have_logged(study, measured, tmp_path, empty_store, drawing):
    (tmp_path / "other").mkdir()
    shutil.copy(empty_store, tmp_path / "other" / "history.db")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    first, uri = (f"tracking.uri=sqlite:///{database}" for database in (measured.root / "mlflow.db", tmp_path / "other" / "history.db"))
    evaluate.run_given(study.context(*PLAIN, first), Given("linear", network, "0", {}))
    transfer.run(study.context(first))
    report.run(study.context(first))
    live = dump(study, first)
    models = {*(f"{scheme}-{regime}-s0" for scheme, regime in MODELS), "CL-at-s0", "SL-at-s0"}
    assert set(live) == models | {"compare", "transfer", "study", "linear"}
    with drawing():
        assert set(tracking.sync(study.place(uri))) == set(live)
    rebuilt = dump(study, uri)
    for name in live:
        for part in live[name]:
            assert rebuilt[name][part] == live[name][part], f"{name}: {part}"
    for store, whole in ((first, live), (uri, rebuilt)):
        assert tracking.sync(study.place(store)) == [] and dump(study, store) == whole


def test_panels_of_the_grid_are_those_of_the_paper_that_have_models(measured):
    about = json.loads((measured.workspace.reports / "compare" / "cka.json").read_text())
    assert [(panel["first"], panel["second"]) for panel in about["panels"]] == [("SL-AT-s0", "CL-AT-s0"), ("CL-AT-s0", "CL-Full-AT-s0")]
    with np.load(measured.workspace.reports / "compare" / "cka.npz") as stored:
        sizes = [len(about["layers"][model]) for model in ("SL-AT-s0", "CL-AT-s0")]
        assert list(stored["SL-AT-s0/CL-AT-s0/clean"].shape) == sizes and sizes[0] < sizes[1]  # SL has no projection head


def test_named_models_are_compared_with_each_other(study, tmp_path):
    """One by name, one by folder from elsewhere, whose adversarial images are missing there and made anew."""
    elsewhere = tmp_path / "elsewhere" / "models" / "finetune" / "CL-Full-AT-s0"
    shutil.copytree(study.workspace.model("CL-Full-AT-s0"), elsewhere)
    out = tmp_path / "out"
    compared = compare.run(study.context(), chosen=("CL-AT-s0", str(elsewhere)), out=out)
    with np.load(study.workspace.reports / "compare" / "cka.npz") as stored:
        for kind in ("clean", "adversarial"):
            assert np.allclose(compared.matrix(compared.panels[0], kind), stored[f"CL-AT-s0/CL-Full-AT-s0/{kind}"], equal_nan=True)
    assert {path.name for path in out.iterdir()} == {"cka.npz", "cka.json", "clean.png", "adversarial.png", "map.png"}


def test_further_measures_stand_beside_cka_and_leave_it_as_it_is(study, measured):
    """From features to claims."""
    context = study.context("similarity.measures=[cka, rsa, knn]")
    for scheme, regime in (("CL", "AT"), ("CL", "Full-AT")):
        metrics = represent.run(context, scheme=scheme, regime=regime, seed=0)
        plain, found = (cka(one, f"{scheme}-{regime}-s0") for one in (measured, study))
        assert all(np.array_equal(found[name], values, equal_nan=True) for name, values in plain.items())
        assert metrics["rsa/redundancy/low"] < metrics["rsa/redundancy"] < metrics["rsa/redundancy/high"]
        assert metrics["knn/redundancy"] > 0 and "knn/redundancy/low" not in metrics
        about = described(study, f"{scheme}-{regime}-s0")["measures"]
        assert about["images"] == 40 and about["intervals"]["knn"].startswith("none")
    compare.run(context)
    assert {"clean-rsa.png", "adversarial-knn.png", "map.png"} <= {path.name for path in (study.workspace.reports / "compare").iterdir()}
    report.run(context)
    claims = json.loads((study.workspace.reports / "claims.json").read_text())["claims"]
    (claim,) = [claim for claim in claims if claim["key"] == "full_fine_tuning_redundancy"]
    rsa = claim["measures"]["rsa"]["parts"][0]
    flat = [json.loads(study.workspace.record("represent", f"CL-{regime}-s0").read_text())["metrics"] for regime in ("Full-AT", "AT")]
    assert rsa["effect"] == pytest.approx(flat[0]["rsa/redundancy"] - flat[1]["rsa/redundancy"], abs=1e-5)
    assert "under 3 measures" in (study.workspace.reports / "report.html").read_text()


def test_all_models_can_see_the_adversarial_images_of_one(study, tmp_path):
    names = ("CL-AT-s0", "SL-AT-s0")
    own, shared = (
        compare.run(study.context(f"similarity.source={source}"), chosen=names, out=tmp_path / source) for source in ("own", "SL-AT-s0")
    )
    (panel,) = own.panels
    assert np.array_equal(own.matrix(panel, "clean"), shared.matrix(panel, "clean"), equal_nan=True)
    assert not np.allclose(own.matrix(panel, "adversarial"), shared.matrix(panel, "adversarial"), equal_nan=True)
    source = json.loads((tmp_path / "SL-AT-s0" / "cka.json").read_text())["adversarial_source"]
    assert {about["model"] for about in source.values()} == {"SL-AT-s0"}
    with pytest.raises(UserError, match=r"similarity\.source = 'CL-XX'"):
        compare.run(study.context("similarity.source=CL-XX"), chosen=names, out=tmp_path / "no")


def test_the_source_may_be_a_model_that_is_not_compared(study, tmp_path):
    models = study.workspace.models
    shutil.copytree(models / "SL-AT-s0", models / "SL-Full-AT-s0")
    context = study.context("similarity.source=SL-Full-AT-s0")
    compared = compare.run(context, chosen=("CL-AT-s0", "SL-AT-s0"), out=tmp_path / "out")
    assert [(panel.first, panel.second) for panel in compared.panels] == [("CL-AT-s0", "SL-AT-s0")]
    source = json.loads((tmp_path / "out" / "cka.json").read_text())["adversarial_source"]
    assert {about["model"] for about in source.values()} == {"SL-Full-AT-s0"}


def test_a_grid_that_has_nothing_to_compare_any_more_leaves_no_figures_behind(study):
    folder, context = study.workspace.reports / "compare", study.context("grid.schemes=[SL]", "grid.adversarial_regimes=[AT]")
    assert (folder / "clean.png").exists()
    assert compare.run(context) is None and json.loads((folder / "cka.json").read_text())["panels"] == []
    assert {path.name for path in folder.iterdir()} == {"cka.json"} and drawn.panels(study.workspace) == {}
    report.run(context)


def test_only_the_comparison_of_the_study_is_recorded(study, tmp_path):
    path = study.workspace.record("compare", "panels")
    before = path.read_text()
    compare.run(study.context("similarity.batch_size=10"), out=tmp_path / "elsewhere")
    assert path.read_text() == before
    with pytest.raises(UserError, match="--out"):
        compare.run(study.context(), chosen=("CL-AT-s0", "SL-AT-s0"), out=study.workspace.reports / "compare")


def test_panels_of_earlier_weights_are_not_shown(study):
    assert set(drawn.panels(study.workspace)) == {"clean", "adversarial", "map"} and drawn.shown(study.workspace) == "each network's own"
    change_model(study.workspace.model("SL-AT-s0"), digest="new weights")
    assert drawn.panels(study.workspace) == {}
    study.workspace.record("compare", "panels").unlink()
    assert drawn.panels(study.workspace) == {}


def test_stored_images_of_another_attack_are_refused_in_the_grid_and_made_anew_for_chosen_models(study, tmp_path):
    other = ("evaluate.epsilon=0.05",)
    with pytest.raises(UserError, match=r"0\.15 .*0\.05, step_size .*dvc repro"):
        compare.run(study.context(*other), out=tmp_path / "no")
    compare.run(study.context(*other), chosen=("CL-AT-s0", "SL-AT-s0"), out=tmp_path / "out")
    source = json.loads((tmp_path / "out" / "cka.json").read_text())["adversarial_source"]
    assert {about["epsilon"] for about in source.values()} == {0.05}


def test_the_grid_is_not_attacked_anew(study):
    study.workspace.adversarial("SL-AT-s0").unlink()
    with pytest.raises(UserError, match="SL-AT-s0"):
        compare.run(study.context())


def change_model(folder: Path, **changes: object) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_models_of_other_classes_are_refused(study, tmp_path):
    change_model(study.workspace.model("SL-AT-s0"), classes=["ash", "birch", "cedar", "elm"])
    with pytest.raises(UserError, match=r"SL-AT-s0 .*\(ash, birch, cedar"):
        compare.run(study.context(), chosen=("CL-AT-s0", "SL-AT-s0"), out=tmp_path / "no")


def test_models_of_other_data_are_refused_in_the_grid_and_noted_for_chosen_models(study, tmp_path, capsys):
    change_model(study.workspace.model("SL-AT-s0"), data={"digest": "another split"})
    with pytest.raises(UserError, match="SL-AT-s0 was trained on other data"):
        compare.run(study.context())
    compare.run(study.context(), chosen=("CL-AT-s0", "SL-AT-s0"), out=tmp_path / "out")
    assert "note: SL-AT-s0 was trained on other data (another split)" in capsys.readouterr().err
    about = json.loads((tmp_path / "out" / "cka.json").read_text())
    assert about["data"] == {"CL-AT-s0": about["images_of"], "SL-AT-s0": "another split"}


def test_a_pretrained_encoder_has_nothing_to_attack(study, tmp_path):
    with pytest.raises(UserError, match="CL-at-s0"):
        compare.run(study.context(), chosen=("CL-AT-s0", "CL-at-s0"), out=tmp_path / "no")


def test_a_model_may_lie_where_there_are_no_three_folders_above_it(study, tmp_path, monkeypatch):
    shutil.copytree(study.workspace.model("SL-AT-s0"), tmp_path / "m")
    monkeypatch.setattr(Path, "resolve", lambda path, *_: Path("/m") if path.name == "m" else Path(os.path.realpath(path)))
    compared = compare.run(study.context(), chosen=("CL-AT-s0", str(tmp_path / "m")), out=tmp_path / "out")
    assert [panel.second for panel in compared.panels] == ["m"]


@pytest.mark.parametrize("chosen", [("CL-AT-s0",), ("CL-AT-s0", "CL-AT-s0")])
def test_one_model_alone_is_refused(study, chosen):
    with pytest.raises(UserError, match="at least two models"):
        compare.run(study.context(), chosen=chosen)


def test_the_page_needs_no_other_file_and_tells_everything(study):
    report.run(study.context())
    page = (study.workspace.reports / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 6
    assert 'src="http' not in page and "<link" not in page
    claims = json.loads((study.workspace.reports / "claims.json").read_text())
    for claim in claims["claims"]:
        assert claim["claim"].replace("'", "&#39;") in page
    for scheme, regime in MODELS:
        assert f"{scheme}-{regime}-s0" in page
    assert {"claims.json", "report.html"} <= artifacts(study, "study")["files"]


def test_the_page_stands_without_representations(study):
    shutil.rmtree(study.root / "records" / "represent")
    shutil.rmtree(study.root / "records" / "compare")
    report.run(study.context())
    assert "Layers within a network" not in (study.workspace.reports / "report.html").read_text()


def test_a_stage_that_is_run_by_hand_again_writes_the_same_bytes(study, drawing, monkeypatch):
    """Or DVC, which has run it before, would call its outputs modified. Nothing in them depends on how, when and where it was started."""

    def outputs() -> dict[str, bytes]:
        found = [path for name in ("data", "models", "records", "reports") for path in (study.root / name).rglob("*")]
        kept = [path for path in found if path.is_file() and path.name != "seconds.json"]  # how long it took is no output of a stage
        return {path.relative_to(study.root).as_posix(): path.read_bytes() for path in kept}

    def run(name: str) -> None:
        of_model = {"scheme": "SL", "regime": "AT", "seed": 0}
        stages = {
            "pretrain": lambda: pretrain.run(study.context(), scheme="SL", phase="at", seed=0),
            "finetune": lambda: finetune.run(study.context(), **of_model),
            "evaluate": lambda: evaluate.run(study.context(), **of_model),
            "represent": lambda: represent.run(study.context(), **of_model),
            "compare": lambda: compare.run(study.context()),
            "transfer": lambda: transfer.run(study.context()),
            "report": lambda: report.run(study.context()),
        }
        with drawing() if name in ("represent", "compare") else contextlib.nullcontext():
            stages[name]()
        shutil.rmtree(study.root / ".scratch", ignore_errors=True)

    monkeypatch.setenv("DVC_STAGE", "a stage")
    for name in ("transfer", "report"):
        run(name)
    before = outputs()
    for variable in ("DVC_STAGE", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("platform.node", lambda: "another-host")
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr("advml.pipeline.training_stage.write_seconds", lambda *_, **__: None)  # the table shows how long it took
    for name in ("pretrain", "finetune", "evaluate", "represent", "compare", "transfer", "report"):
        run(name)
        after = outputs()
        assert [path for path in {**before, **after} if before.get(path) != after.get(path)] == [], name


def test_show_tells_the_representation_of_these_weights_only(study):
    assert "cka/redundancy  " in record_of(study.workspace, "CL-AT-s0")
    path = study.workspace.record("represent", "CL-AT-s0")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "other"}))
    assert "cka/redundancy" not in record_of(study.workspace, "CL-AT-s0")
