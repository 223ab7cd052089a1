"""`transfer` on a tiny study of two seeds: its files, its run, its place on the page, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest
from PIL import Image

from advml import cli
from advml.core import paths
from advml.core.errors import UserError
from advml.data import adversarial
from advml.evaluation import records
from advml.evaluation.transfer import FLAG
from advml.pipeline.stages import evaluate, finetune, pretrain, report, transfer

QUICK = (
    "pretrain.SL.epochs=1",
    "regimes.AT.epochs=1",
    "regimes.Partial-AT.epochs=1",
    "worst_case.attacks=[]",
    "diagnostics.images=0",
    "corruptions.names=none",
    "grid.schemes=[SL]",
    "grid.standard_regimes=[]",
)
GRID = ("seeds=[0, 1]", "grid.adversarial_regimes=[AT, Partial-AT, Full-AT]", "evaluate.restarts=2", "evaluate.adversarial_images=13")


@pytest.fixture(scope="module")
def measured(new_study, tmp_path_factory, drawing):
    """Two models of each of two seeds; Full-AT was not trained."""
    study = new_study(tmp_path_factory.mktemp("transfer") / "study", *QUICK, *GRID)
    for seed in (0, 1):
        pretrain.run(study.context(), scheme="SL", phase="at", seed=seed)
        for regime in ("AT", "Partial-AT"):
            finetune.run(study.context(), scheme="SL", regime=regime, seed=seed)
            evaluate.run(study.context(), scheme="SL", regime=regime, seed=seed)
    with drawing():
        transfer.run(study.context())
    return study


@pytest.fixture
def study(measured, tmp_path):
    """A copy, for one test."""
    return measured.copy(tmp_path / "copy")


def content(study) -> dict:
    return json.loads((study.workspace.reports / "transfer" / "transfer.json").read_text())


def test_models_of_different_seeds_are_not_mixed(measured):
    blocks = content(measured)["seeds"]
    assert [block["models"] for block in blocks] == [[f"SL-AT-s{seed}", f"SL-Partial-AT-s{seed}"] for seed in (0, 1)]
    rows = (measured.workspace.reports / "transfer" / "transfer.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 4 and all(row.split(",")[1][-1] == row.split(",")[2][-1] == row[0] for row in rows[1:])


def test_the_diagonal_is_threat_model_2_after_its_first_restart(study):
    """Of the images that are stored: the first 13 of 40."""
    once = study.context("evaluate.restarts=1", "evaluate.adversarial_images=null")
    for regime in ("AT", "Partial-AT"):
        evaluate.run(once, scheme="SL", regime=regime, seed=0)
    whole = transfer.run(once)[0]
    for number, name in enumerate(whole["models"]):
        metrics = json.loads((study.workspace.report(name) / "metrics.json").read_text())
        assert whole["accuracy"][number][number] == metrics["accuracy/threat_model_2"]
        assert whole["intervals"][number][number] == [metrics[f"accuracy/threat_model_2/{end}"] for end in ("low", "high")]
        assert whole["clean"][number] == metrics["accuracy/clean"]
    assert whole["n"] == [40, 40] and whole["breaks"][0]["sources"].keys() <= {"SL-Partial-AT-s0"}


def test_the_files_tell_what_was_scored_and_how(measured):
    block = content(measured)["seeds"][0]
    assert block["n"] == [13, 13] and block["attacks"][0]["model"] == "SL-AT-s0" and block["attacks"][0]["steps"] == 2
    digest = json.loads((measured.workspace.model("SL-AT-s0") / "model.json").read_text())["digest"]
    assert block["digests"]["SL-AT-s0"] == digest
    record = json.loads(measured.workspace.record("transfer", "matrix").read_text())
    assert record["digests"].keys() == {name for block in content(measured)["seeds"] for name in block["models"]}
    assert record["transfer"] == hashlib.sha256((measured.workspace.reports / "transfer" / "transfer.json").read_bytes()).hexdigest()
    with Image.open(measured.workspace.reports / "transfer" / "transfer.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("L").getcolors()) > 50  # something is drawn


def test_the_run_carries_table_and_picture(measured):
    store = measured.store()
    (run,) = [run for run in store.client.search_runs([store.experiment]) if run.info.run_name == "transfer"]
    assert run.data.tags["advml.kind"] == "comparison" and "transfer_breaks/SL-AT-s1" in run.data.metrics
    found = {each.path for each in store.client.list_artifacts(run.info.run_id, "transfer")}
    assert found == {f"transfer/{name}" for name in (*paths.TRANSFER_FILES, "pairs.json")}
    assert store.client.list_artifacts(run.info.run_id, "images")


def test_the_runs_of_the_models_say_what_a_transfer_has_flagged_of_them(study, monkeypatch):
    flag = {"model": "SL-AT-s1", "name": "transfer_stronger", "saw": "it", "try": "that"}
    real = transfer.describe
    monkeypatch.setattr(transfer, "describe", lambda found, *, seed: real(found, seed=seed) | {"flags": [flag] * (seed == 1)})
    transfer.run(study.context())
    store = study.store()
    tags = {run.info.run_name: run.data.tags.get("advml.transfer_flags") for run in store.client.search_runs([store.experiment])}
    assert tags["SL-AT-s1"] == "transfer_stronger" and {tags["SL-Partial-AT-s1"], tags["SL-AT-s0"]} == {"none"}


@pytest.mark.parametrize("models", [1, 0])
def test_a_grid_of_one_model_is_no_error_and_says_so(study, capsys, models):
    params, grid = study.root / "params.yaml", ["-S", "grid.adversarial_regimes=[AT]"]
    if not models:
        shutil.rmtree(study.root / "records" / "evaluate")
    cli.app(["transfer", "--params", str(params), *grid], standalone_mode=False)
    assert records.NO_PAIRS in capsys.readouterr().out
    assert content(study)["seeds"] == [] and content(study)["reason"] == records.NO_PAIRS
    assert not (study.workspace.reports / "transfer" / "transfer.png").exists()


def test_the_command_names_the_flagged_models_of_each_seed(study, monkeypatch, capsys):
    real = transfer.describe
    monkeypatch.setattr(transfer, "describe", lambda found, *, seed: real(found, seed=seed) | {"flags": [{"model": "SL-AT-s1"}] * seed})
    cli.app(["transfer", "--params", str(study.params)], standalone_mode=False)
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("seed "))
    assert first.startswith("seed 0: 2 models") and first.endswith("none")
    assert second.startswith("seed 1: 2 models") and second.endswith("SL-AT-s1")


@pytest.mark.parametrize("fault", ["other weights", "no adversarial images", "no samples", "damaged samples", "older samples"])
def test_stale_missing_and_damaged_files_are_refused_in_one_line(study, fault):
    name = "SL-Partial-AT-s0"
    images, samples = study.workspace.adversarial(name), study.workspace.samples(name)
    if fault == "other weights":
        found = adversarial.AdversarialImages(
            adversarial.read(images, digest=digest_of(study, name)).images, {"model": name, "digest": "0"}
        )
        adversarial.write(found, images)
    elif fault == "no adversarial images":
        images.unlink()
    elif fault == "no samples":
        samples.unlink()
    elif fault == "damaged samples":
        samples.write_bytes(samples.read_bytes()[:200])
    else:
        shutil.copy(study.workspace.samples("SL-AT-s0"), samples)
    with pytest.raises(UserError, match=f"{name}.*dvc repro") as refused:
        transfer.run(study.context())
    assert "\n" not in str(refused.value)


def digest_of(study, name: str) -> str:
    return json.loads((study.workspace.model(name) / "model.json").read_text())["digest"]


def test_the_page_shows_the_matrix_and_names_flagged_models(study):
    report.run(study.context())
    page = (study.workspace.reports / "report.html").read_text()
    assert "Transfer of attacks" in page and "no sign of gradient masking" in page
    found = content(study)
    saw = "adversarial images of other models break 9 of 10 images"
    found["seeds"][1]["flags"] = [{"model": "SL-AT-s1", "name": FLAG, "saw": saw, "try": "more"}]
    records.write_transfer(study.workspace, found["seeds"], rule=found["rule"], picture=b"", made_by={})
    report.run(study.context())
    page = (study.workspace.reports / "report.html").read_text()
    assert re.search(rf">SL-AT-s1<.{{0,20}}: {saw}", page) and "no sign of gradient masking" not in page


def test_the_page_stands_without_transfer(study):
    shutil.rmtree(study.root / "records" / "transfer")
    report.run(study.context())
    assert "Transfer of attacks" not in (study.workspace.reports / "report.html").read_text()
