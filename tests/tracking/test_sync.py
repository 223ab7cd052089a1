"""Runs rebuilt from files, and brought up to date with them."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from advml import tracking
from advml.core.errors import Failure, UserError
from advml.core.paths import REPORT_FILES
from advml.core.processes import this_process


@pytest.fixture
def study(project):
    """A pretraining and two models, one of them evaluated."""
    project.write_model("CL-at-s0", "pretrain", digest="a" * 64)
    parent = {"name": "CL-at-s0", "digest": "a" * 64, "path": "models/pretrain/CL-at-s0"}
    project.write_model("CL-AT-s0", "model", digest="b" * 64, pretraining=parent)
    project.write_evaluation("CL-AT-s0", {"accuracy/clean": 0.9})
    project.write_model("CL-Full-AT-s0", "model", digest="c" * 64, pretraining=parent)
    return project


def folder_of(study, name: str) -> Path:
    return study.root / "models" / "finetune" / name


def test_sync_rebuilds_everything_from_files_once(study):
    assert study.sync() == ["CL-at-s0", "CL-AT-s0", "CL-Full-AT-s0"]
    assert study.sync() == []
    runs = {record.info.run_name: record for record in study.runs()}
    assert set(runs) == {"CL-at-s0", "CL-AT-s0", "CL-Full-AT-s0"}
    record = runs["CL-AT-s0"]
    assert record.info.status == "FINISHED"
    assert (record.info.start_time, record.info.end_time) == (1_000_000_100_000, 1_000_000_100_000)
    assert record.data.params == study.compared | {"epsilon": "0.15", "norm": "linf"}
    assert record.data.metrics == {"accuracy/clean": 0.9, "train/loss": 0.2, "validation/accuracy": 0.5}
    assert study.steps(record.info.run_id, "train/loss") == [1, 2, 3, 4, 5]
    expected = {
        "kind": "model",
        "regime": "AT",
        "scheme": "CL",
        "seed": "0",
        "digest": "b" * 64,
        "synced": "true",
        "path": "models/finetune/CL-AT-s0",
    }
    assert {f"advml.{key}": value for key, value in expected.items()}.items() <= record.data.tags.items()
    assert record.data.tags["advml.pretraining_run"] == runs["CL-at-s0"].info.run_id
    assert record.data.tags["mlflow.source.git.commit"] == "c" * 40
    assert record.inputs.dataset_inputs[0].dataset.name == study.data["source"]
    assert study.artifacts(record.info.run_id, "records/evaluate") == {"records/evaluate/CL-AT-s0.json"}
    model = study.store.client.get_logged_model(record.data.tags["advml.model_id"])
    assert model.metrics[0].key == "accuracy/clean"


def test_sync_leaves_a_run_that_training_made_and_adds_metrics_that_came_later(study):
    with study.open_run(name="CL-Full-AT-s0") as run:
        run.log_checkpoint(folder_of(study, "CL-Full-AT-s0"), digest="c" * 64)
    assert study.sync() == ["CL-at-s0", "CL-AT-s0", "CL-Full-AT-s0"]  # the last one lacked its curves
    later = {"accuracy/clean": 0.8, "accuracy/threat_model_2": 0.4}
    study.write_evaluation("CL-Full-AT-s0", later)
    before = study.entity(run.id)
    assert [study.sync() for _ in range(2)] == [["CL-Full-AT-s0"], []]
    after = study.entity(run.id)
    assert after.data.metrics == later | {"train/loss": 0.2, "validation/accuracy": 0.5}
    assert study.steps(run.id, "accuracy/clean") == [0]
    assert after.data.params["epsilon"] == "0.15" and after.data.tags["advml.flags"] == "a flag"
    assert (after.info.status, after.info.end_time) == (before.info.status, before.info.end_time)


def test_curves_and_link_that_come_after_the_weights_are_added_once(study):
    """History that was pulled later, or written when the store had gone; a pretraining that the store had missed."""
    curves = study.root / "reports" / "CL-AT-s0" / "history.json"
    history = curves.rename(study.root / "later.json")
    with study.open_run() as run:
        run.log_checkpoint(folder_of(study, "CL-AT-s0"), digest="b" * 64)
    study.sync()
    assert "curves.png" not in study.artifacts(run.id) and study.steps(run.id, "train/loss") == []
    history.rename(curves)
    for changed in (["CL-AT-s0"], []):
        assert study.sync() == changed
        assert "curves.png" in study.artifacts(run.id) and study.steps(run.id, "train/loss") == [1, 2, 3, 4, 5]
    record = study.entity(run.id)
    assert record.data.tags["advml.pretraining_name"] == "CL-at-s0" and len(record.inputs.model_inputs) == 1


def test_a_stage_adds_to_the_run_of_its_model_and_rebuilds_one_that_is_missing(study, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "evaluate_at@CL-AT-0")
    monkeypatch.setenv("DVC_EXP_NAME", "brave-name")
    for value in (0.5, 0.5, 0.6):
        study.write_evaluation("CL-AT-s0", {"accuracy/clean": value})
        tracking.log_folder(study.place, folder_of(study, "CL-AT-s0"))
    (record,) = study.runs()
    assert (record.info.status, record.data.metrics["accuracy/clean"]) == ("FINISHED", 0.6)
    assert len(study.steps(record.info.run_id, "accuracy/clean")) == 2
    tags = record.data.tags  # of the training, not of the stage that has rebuilt it
    assert not {"advml.dvc_stage", "advml.dvc_experiment"} & set(tags) and tags["mlflow.source.name"] == "advml"
    assert study.sync() == ["CL-at-s0", "CL-Full-AT-s0"] and study.sync() == []


def test_sync_makes_a_new_run_for_weights_that_were_trained_anew(study):
    study.sync()
    shutil.rmtree(folder_of(study, "CL-AT-s0"))
    study.write_model("CL-AT-s0", "model", digest="e" * 64)
    assert study.sync() == ["CL-AT-s0"]
    anew = study.store.find(digest="e" * 64)
    assert "accuracy/clean" not in anew.data.metrics and "epsilon" not in anew.data.params  # measured on the weights of before


def test_the_run_of_a_model_that_was_replaced_says_so_until_its_weights_are_back(study):
    study.sync()
    before, client = study.newest("CL-AT-s0"), study.store.client
    distant, training = study.open_run(), study.open_run()
    distant.log_checkpoint(study.root, digest="f" * 64)
    distant.set_tags({"advml.folder": "elsewhere:/study"})
    study.write_model("CL-AT-s0", "model", digest="e" * 64)
    study.sync()
    anew = study.store.find(digest="e" * 64)

    def names() -> list[str]:
        return [study.entity(run_id).info.run_name for run_id in (before.info.run_id, anew.info.run_id, distant.id, training.id)]

    assert names() == ["CL-AT-s0 (replaced)", "CL-AT-s0", "CL-AT-s0", "CL-AT-s0"] and study.sync() == []
    client.update_run(anew.info.run_id, name="my best")
    study.write_model("CL-AT-s0", "model", digest="b" * 64)
    assert study.sync() == ["CL-AT-s0"] and study.sync() == []
    assert names() == ["CL-AT-s0", "my best (replaced)", "CL-AT-s0", "CL-AT-s0"]


def test_sync_ends_runs_whose_process_is_gone(study):
    orphan, done, reused, alive, distant, unknown = (study.open_run() for _ in range(6))
    done.log_checkpoint(study.root, digest="f" * 64)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    gone = f"{platform.node()}:{process.pid}:1"
    client = study.store.client
    names = {orphan: gone, done: f"{platform.node()}:kernel:{process.pid}:1", reused: f"{platform.node()}:{os.getpid()}:1"}
    names |= {distant: f"elsewhere:{process.pid}:1", unknown: "x"}
    for run, name in names.items():
        client.set_tag(run.id, "advml.process", name)
    study.sync()
    ends = [study.entity(run.id).info.status for run in (orphan, done, reused, alive, distant, unknown)]
    assert ends == ["KILLED", "FINISHED", "KILLED", "RUNNING", "RUNNING", "RUNNING"]


def test_a_step_of_the_clock_ends_no_run(study, monkeypatch):
    run, before = study.open_run(), this_process()
    boot, whole = psutil.boot_time(), psutil.Process.create_time
    monkeypatch.setattr("psutil.boot_time", lambda: boot + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: whole(self) + 3600)
    study.sync()
    assert this_process() == before and study.entity(run.id).info.status == "RUNNING"


def test_sync_says_in_one_line_why_it_cannot(study):
    with pytest.raises(Failure, match=r"^http://127.0.0.1:9: .*tracking\.uri=\.\.\.$"):
        study.having("tracking.uri=http://127.0.0.1:9").sync()
    path = folder_of(study, "CL-AT-s0") / "model.json"
    for text in ("{", '{"name": "CL-AT-s0"}', "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"^{path} .*dvc checkout {path.parent}$"):
            study.sync()


# Results that have runs of their own


@pytest.fixture
def reported(project):
    """The files of `report`."""
    (project.root / "reports").mkdir(exist_ok=True)
    for name in REPORT_FILES:
        (project.root / "reports" / name).write_text("model,accuracy/clean,note\nCL-AT-s0,0.9,\n")
    made = {"git_commit": "c" * 40, "parameters": {"seeds": [0]}}
    (project.root / "reports" / "claims.json").write_text(json.dumps({"claims": [{"claim": "a", "verdict": "b", "parts": []}], **made}))
    return project


@pytest.mark.parametrize("method", ["log_batch", "log_artifact", "log_dict", "set_tag", "set_terminated"])
def test_an_outage_in_the_middle_of_a_result_is_mended_by_the_next_sync(reported, monkeypatch, method):
    from mlflow import MlflowClient

    def down(*_, **__):
        raise ConnectionError("down")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, method, down)
        with pytest.raises(Failure, match="down"):
            reported.sync()
    (begun,) = reported.runs()
    reported.store.client.set_tag(begun.info.run_id, "advml.process", f"{platform.node()}:999999999:1")  # as that of an earlier process
    reported.sync()
    assert reported.sync() == []
    (record,) = reported.runs()
    assert record.info.status == "FINISHED" and record.data.params == {"seeds": "[0]"}
    assert reported.artifacts(record.info.run_id) == {*REPORT_FILES, "config", "summary.json", "claims_table.json"}
    (file,) = (reported.root / "mlruns").rglob("summary.json")
    assert json.loads(file.read_text()) == {"columns": ["model", "accuracy/clean"], "data": [["CL-AT-s0", 0.9]]}


def test_a_result_of_other_files_is_a_new_run_and_one_that_is_not_whole_waits(reported):
    tracking.log_result(reported.place, "study")
    assert reported.sync() == []
    (reported.root / "reports" / "report.html").unlink()
    assert reported.sync() == []
    (reported.root / "reports" / "report.html").write_text("other")
    assert reported.sync() == ["study"]
    assert len(reported.runs()) == 2


def test_a_comparison_that_lies_elsewhere_is_logged_by_its_stage(project, tmp_path):
    write_comparison(out := tmp_path / "elsewhere")
    tracking.log_result(project.place, out)
    assert [run.info.run_name for run in project.runs()] == ["elsewhere"]


# A value that changes in a file changes in MLflow


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_picture(path: Path) -> None:
    from PIL import Image

    Image.new("L", (2, 2)).save(path)


def write_comparison(folder: Path) -> None:
    write_json(folder / "cka.json", {"panels": [], "probes": {"strengths": [1.0]}})
    (folder / "cka.npz").write_bytes(b"arrays")
    for name in ("cka", "layers", "clean", "adversarial"):
        write_picture(folder / f"{name}.png")


@pytest.fixture
def whole(study, reported):
    """A study with a file of every kind, and its runs."""
    reports, records = study.root / "reports", study.root / "records"
    representation = {"digest": "b" * 64, "cka": "k" * 64, "metrics": {"probe/clean": 0.6045, "cka/rankme": 2.5}}
    write_json(records / "represent" / "CL-AT-s0.json", representation | {"parameters": {"similarity": {"gram": "auto"}}})
    for folder in (reports / "CL-AT-s0", reports / "compare"):
        write_comparison(folder)
    block = {"seed": 0, "digests": {"CL-AT-s0": "b" * 64}, "breaks": [{"model": "CL-AT-s0", "transfer_breaks": 3}], "flags": []}
    write_json(reports / "transfer" / "transfer.json", {"seeds": [block]})
    (reports / "transfer" / "transfer.csv").write_text("source,target,n\nCL-AT-s0,CL-AT-s0,40\n")
    write_picture(reports / "transfer" / "transfer.png")
    write_json(reports / "mine" / "evaluation.json", {"metrics": {"accuracy/clean": 0.7}, "parameters": {"evaluate": {"steps": 7}}})
    (reports / "mine" / "samples.parquet").write_bytes(b"samples")
    (reports / "tune" / "attack").mkdir(parents=True)
    (reports / "tune" / "attack" / "best.yaml").write_text("parameters: {attack.steps: 5}\nscored: {robust: 0.57}\n")
    (reports / "tune" / "attack" / "trials.csv").write_text("trial,state,robust\n0,complete,0.57\n")
    study.sync()
    return study


# File, the value in it that changes, and what it becomes; the run, and where it must show the new value.
CHANGES = {
    "curves": ("reports/CL-AT-s0/history.json", "0.25", "0.26", "CL-AT-s0", ("curve", "train/loss", 4, 0.26)),
    "curves, at the end": ("reports/CL-AT-s0/history.json", "0.2,", "0.1,", "CL-AT-s0", ("metric", "train/loss", 0.1)),
    "model record": (
        *("models/finetune/CL-AT-s0/model.json", '"epochs": 5', '"epochs": 6', "CL-AT-s0"),
        ("tag", "advml.now.training.finetune.epochs", "6"),
    ),
    "commit": ("models/pretrain/CL-at-s0/model.json", "c" * 40, "d" * 40, "CL-at-s0", ("tag", "mlflow.source.git.commit", "d" * 40)),
    "evaluation": ("records/evaluate/CL-AT-s0.json", "0.9", "0.8", "CL-AT-s0", ("metric", "accuracy/clean", 0.8)),
    "flags": ("records/evaluate/CL-AT-s0.json", "a flag", "another", "CL-AT-s0", ("tag", "advml.flags", "another")),
    "probes": ("records/represent/CL-AT-s0.json", "0.6045", "0.621", "CL-AT-s0", ("metric", "probe/clean", 0.621)),
    "how it was measured": ("records/represent/CL-AT-s0.json", "auto", "low", "CL-AT-s0", ("config", "config/representation.yaml", "low")),
    "radius": ("records/evaluate/CL-AT-s0.json", "0.15", "0.25", "CL-AT-s0", ("tag", "advml.now.epsilon", "0.25")),
    "layers": ("reports/CL-AT-s0/cka.json", "1.0", "0.1", "CL-AT-s0", ("artifact", "cka/cka.json")),
    "comparison": ("reports/compare/cka.json", "1.0", "0.1", "compare", ("artifact", "cka/cka.json")),
    "transfer": ("reports/transfer/transfer.json", "3", "4", "transfer", ("metric", "transfer_breaks/CL-AT-s0", 4)),
    "pairs": ("reports/transfer/transfer.csv", "40", "41", "transfer", ("artifact", "transfer/transfer.csv")),
    "page": ("reports/report.html", "0.9", "0.8", "study", ("artifact", "report.html")),
    "claims": ("reports/claims.json", '"b"', '"c"', "study", ("artifact", "claims.json")),
    "evaluation of a given model": ("reports/mine/evaluation.json", "0.7", "0.6", "mine", ("metric", "accuracy/clean", 0.6)),
    "search": ("reports/tune/attack/best.yaml", "0.57", "0.53", "attack", ("metric", "best/robust", 0.53)),
    "trials": ("reports/tune/attack/trials.csv", "0.57", "0.53", "attack", ("artifact", "tune/trials.csv")),
}


def test_a_value_that_changes_in_a_file_changes_in_mlflow(whole):
    assert whole.sync() == []
    for kind, (name, old, new, run, shown) in CHANGES.items():
        path = whole.root / name
        text = path.read_text()
        assert text.count(old) == 1, kind
        path.write_text(text.replace(old, new))
        assert whole.sync() == [run], kind
        assert is_shown(whole, run, path, *shown), kind
        assert whole.sync() == [], kind
    store, path = whole.store, folder_of(whole, "CL-AT-s0") / "model.json"
    model = store.client.get_logged_model(whole.newest("CL-AT-s0").data.tags["advml.model_id"])
    assert Path(model.artifact_location.removeprefix("file://"), "model.json").read_bytes() == path.read_bytes()


def test_a_model_is_described_with_result_flags_pretraining_and_pictures_and_results_by_their_commit(whole):
    write_json(whole.root / "records" / "evaluate" / "CL-AT-s0.json", {"digest": "b" * 64, "metrics": MEASURED, "diagnostics": {}})
    whole.sync()
    record = whole.newest("CL-AT-s0")
    note = record.data.tags["mlflow.note.content"]
    told = (
        "contrastive (SimCLR)",
        "adversarial pretraining",
        "worst case 50.0 % [40.0, 60.0]",
        "not judged",
        "[CL-at-s0](",
        "/artifacts/cka.png?",
    )
    assert [words for words in told if words not in note] == []
    assert "accuracy/worst_case/low" not in record.data.metrics and "corruption/fog" not in record.data.metrics
    table = json.loads((Path(record.info.artifact_uri.removeprefix("file://")) / "evaluation.json").read_text())
    assert table["columns"] == ["figure", "value", "low", "high"] and ["corruption/fog", 0.3, None, None] in table["data"]
    assert {"cka.png", "layers.png"} <= whole.artifacts(record.info.run_id)
    assert whole.newest("study").info.run_name == "study ccccccc"


def test_a_picture_that_has_not_changed_is_logged_once(whole):
    run = whole.newest("CL-AT-s0").info.run_id

    def logged(key: str) -> int:
        return sum(path.startswith(f"images/cka~{key}+") for path in whole.artifacts(run, "images"))

    before = {key: logged(key) for key in ("cka", "layers")}
    whole.store.client.set_tag(run, "advml.representation", "k" * 64)
    assert whole.sync() == ["CL-AT-s0"]
    assert {key: logged(key) for key in before} == before and all(before.values())
    picture = (whole.root / "reports" / "transfer" / "transfer.png").read_bytes()
    (whole.root / "reports" / "CL-AT-s0" / "cka.png").write_bytes(picture + b"\0")
    assert whole.sync() == ["CL-AT-s0"]
    assert logged("cka") == 2 * before["cka"] and logged("layers") == before["layers"]


MEASURED = {"accuracy/worst_case": 0.5, "accuracy/worst_case/low": 0.4, "accuracy/worst_case/high": 0.6, "corruption/fog": 0.3}


def is_shown(project, name, file, what, key, *value) -> bool:
    record = project.newest(name)
    if what == "curve":
        history = project.store.client.get_metric_history(record.info.run_id, key)
        at = [point.value for point in sorted(history, key=lambda point: point.timestamp) if point.step == value[0]]
        return at[-1] == value[1] and len(at) == 2  # the changed one, and no other a second time
    if what == "config":
        return value[0] in (Path(record.info.artifact_uri.removeprefix("file://")) / key).read_text()
    if what == "artifact":
        return (Path(record.info.artifact_uri.removeprefix("file://")) / key).read_bytes() == file.read_bytes()
    return {"metric": record.data.metrics, "tag": record.data.tags}[what][key] == value[0]


def test_what_is_not_measured_any_more_is_nan_and_not_yesterdays_value(study):
    """MLflow deletes no metric."""
    for metrics in ({"accuracy/clean": 0.9, "corruption/mean": 0.8, "diagnostics/flags": 0}, {"accuracy/clean": 0.9}):
        study.write_evaluation("CL-AT-s0", metrics)
        study.sync()
    shown = study.newest("CL-AT-s0").data.metrics
    assert shown["accuracy/clean"] == 0.9 and shown["train/loss"] == 0.2
    assert math.isnan(shown["corruption/mean"]) and math.isnan(shown["diagnostics/flags"])
    study.write_evaluation("CL-AT-s0", {"accuracy/clean": 0.9, "corruption/mean": 0.8})
    study.sync()
    assert study.newest("CL-AT-s0").data.metrics["corruption/mean"] == 0.8
