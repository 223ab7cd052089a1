"""What a run holds, how it ends, and how it is gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
import yaml

from advml import tracking
from advml.core.errors import Failure
from advml.core.signals import ENDING, obey


def test_a_run_carries_name_tags_parameters_data_and_commit(project, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=project.root, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "start"], cwd=project.root, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project.root, check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("DVC_STAGE", "finetune@CL-AT-s0")
    monkeypatch.setenv("DVC_EXP_NAME", "brave-name")
    (project.root / "params.yaml").write_text("seeds: [0]")
    subprocess.run([*git, "add", "params.yaml"], cwd=project.root, check=True)
    with project.open_run() as run:
        pass
    record = project.entity(run.id)
    assert record.info.run_name == "CL-AT-s0"
    assert record.data.params == project.compared
    (whole,) = (project.root / "mlruns").rglob("config/training.yaml")
    assert yaml.safe_load(whole.read_text()) == project.parameters
    expected = {
        "advml.name": "CL-AT-s0",
        "advml.kind": "model",
        "advml.scheme": "CL",
        "advml.regime": "AT",
        "advml.seed": "0",
        "advml.data_digest": project.data["digest"],
        "advml.dvc_stage": "finetune@CL-AT-s0",
        "advml.dvc_experiment": "brave-name",
        "mlflow.source.git.commit": f"{commit}-dirty",
        "mlflow.source.name": "dvc repro finetune@CL-AT-s0",
    }
    assert expected.items() <= record.data.tags.items()
    assert record.data.tags["mlflow.user"]
    (used,) = record.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == (project.data["source"], project.data["digest"][:12])
    assert json.loads(used.dataset.profile) == project.data["counts"]


def test_parameters_beyond_mlflows_limits_are_logged_in_batches_and_cut(project, capfd):
    with project.open_run() as run:
        run.log_params({f"key{number}": number for number in range(250)} | {"long": "x" * 9000})
    logged = project.entity(run.id).data.params
    assert len(logged) == 251 + len(project.compared)
    assert logged["long"] == "x" * 6000
    assert capfd.readouterr() == ("", "")


def test_an_epoch_costs_one_call_and_no_read(project, monkeypatch):
    from mlflow import MlflowClient

    calls = []
    with project.open_run() as run:
        for name in ("log_batch", "get_metric_history", "get_run", "search_runs", "log_metric"):
            original = getattr(MlflowClient, name)
            monkeypatch.setattr(
                MlflowClient, name, lambda *a, _name=name, _original=original, **k: calls.append(_name) or _original(*a, **k)
            )
        for epoch in range(1, 4):
            run.log_epochs([record | {"note": "text", "absent": None} for record in project.history[:epoch]])
        assert calls == ["log_batch"] * 3
    assert set(project.entity(run.id).data.metrics) == {"train/loss", "validation/accuracy"}  # numbers only


def test_parameters_of_a_later_stage_are_added_and_those_that_have_changed_are_tags_and_in_the_description(project, capfd):
    def told() -> tuple[dict[str, str], str]:
        tags = project.entity(run.id).data.tags
        return {key: value for key, value in tags.items() if key.startswith("advml.now.")}, tags.get("mlflow.note.content", "")

    with project.open_run() as run:
        run.log_params({"evaluate.steps": 20, "evaluate.epsilon": None})
        assert told()[0] == {} and "last measurement" not in told()[1]
        run.log_params({"evaluate.steps": 40, "evaluate.epsilon": None})
        assert told()[0] == {"advml.now.evaluate.steps": "40"} and told()[1].endswith("The last measurement took: `evaluate.steps` 40")
    assert project.entity(run.id).data.params == project.compared | {"evaluate.steps": "20", "evaluate.epsilon": "null"}
    with project.open_run(run_id=run.id) as run:
        run.log_params({"evaluate.steps": 20})
        assert told()[0] == {} and "last measurement" not in told()[1]
    assert capfd.readouterr() == ("", "")


def test_a_table_that_is_logged_again_is_replaced(project):
    with project.open_run() as run:
        for _ in range(2):
            run.log_table([{"model": "CL-AT-s0", "clean": 0.90004}, {"model": "SL-AT-s0", "robust": 0.7}], "summary.json")
    (file,) = (project.root / "mlruns").rglob("summary.json")
    table = json.loads(file.read_text())
    assert table == {"columns": ["model", "clean", "robust"], "data": [["CL-AT-s0", 0.9, None], ["SL-AT-s0", None, 0.7]]}
    assert json.loads(project.entity(run.id).data.tags["mlflow.loggedArtifacts"]) == [{"path": "summary.json", "type": "table"}]


def test_a_checkpoint_is_an_external_model_with_path_digest_and_final_metrics(project):
    folder = project.write_model("CL-AT-s0", "model", digest="w" * 64)
    with project.open_run() as run:
        run.log_checkpoint(folder, digest="w" * 64)
        run.log_checkpoint(folder, digest="w" * 64)
        run.log_metrics({"accuracy/clean": 0.9, "accuracy/clean/low": 0.8})
    store = project.store
    (model,) = store.client.search_logged_models([store.experiment])
    assert (model.name, model.source_run_id, str(model.status)) == ("CL-AT-s0", run.id, "READY")
    assert model.params == {"path": "models/finetune/CL-AT-s0", "sha256": "w" * 64}
    assert model.tags["mlflow.model.isExternal"] == "true"
    assert {metric.key: metric.value for metric in model.metrics} == {"accuracy/clean": 0.9, "accuracy/clean/low": 0.8}
    of = (project.data["source"], project.data["digest"][:12])
    assert {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics} == {of}
    assert [entry.path for entry in store.client.list_logged_model_artifacts(model.model_id)] == ["model.json"]
    record = project.entity(run.id)
    assert [output.model_id for output in record.outputs.model_outputs] == [model.model_id]
    assert 'advml.load_model("models/finetune/CL-AT-s0")' in record.data.tags["mlflow.note.content"]


@pytest.mark.parametrize("method", ["log_batch", "log_figure", "finalize_logged_model"])
def test_a_run_is_complete_only_once_all_of_it_is_recorded_and_an_outage_costs_one_line(project, monkeypatch, capfd, method):
    def fail(*_, **__):
        raise OSError("disk full")

    folder = project.write_model("CL-AT-s0", "model", digest="w" * 64)
    with project.open_run() as run, monkeypatch.context() as patch:
        patch.setattr(f"mlflow.MlflowClient.{method}", fail)
        tracking.log_model(run, folder, digest="w" * 64)
    told = capfd.readouterr().err
    assert "disk full" in told and told.count("\n") == 1
    assert "advml.digest" not in project.entity(run.id).data.tags


def test_a_model_links_to_the_newest_run_that_pretrained_it(project):
    folder, parent = project.write_model("CL-at-s0", "pretrain", digest="p" * 64), {"name": "CL-at-s0", "digest": "p" * 64}
    with project.open_run(pretraining=parent) as early:
        pass
    for digest in ("p" * 64, "p" * 64, "q" * 64):
        with project.open_run(name="CL-at-s0", kind="pretrain") as run:
            run.log_checkpoint(folder, digest=digest)
        if digest == "p" * 64:
            pretraining = run
        time.sleep(0.002)  # runs are ordered by milliseconds
    with project.open_run(pretraining=parent) as run:
        pass
    record = project.entity(run.id)
    assert "advml.pretraining_run" not in early.tags and record.data.tags["advml.pretraining_run"] == pretraining.id
    link = f"#/experiments/{record.info.experiment_id}/runs/{pretraining.id}?workflowType=machine_learning"
    assert f"Pretraining: [CL-at-s0]({link})" in record.data.tags["mlflow.note.content"]
    with project.open_run(pretraining=parent, run_id=run.id):
        (used,) = project.entity(run.id).inputs.model_inputs
        assert used.model_id == pretraining.tags["advml.model_id"]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (Failure, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_run_that_ends_badly_says_how(project, error, status):
    with pytest.raises(error), project.open_run() as run:
        raise error
    assert project.entity(run.id).info.status == status


def obey_all():
    """Also those that the test runner ignores, in the background or under nohup."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    obey()


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGTERM,), 143),
        ((signal.SIGTERM, signal.SIGTERM), 143),
        ((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), 143),
        ((signal.SIGHUP, signal.SIGTERM), 129),
        ((signal.SIGINT, signal.SIGTERM, signal.SIGTERM), 1),  # a KeyboardInterrupt, for which a fork has no code
    ],
    ids=lambda value: "+".join(one.name for one in value) if isinstance(value, tuple) else "",
)
def test_signals_end_the_run_as_killed_however_many_come_at_once(project, fork, numbers, code):
    """The others arrive while the first one's exception is on its way, at the moment when the run is to be ended."""

    def work():
        first, *others = numbers
        leave = tracking.Run.__exit__
        tracking.Run.__exit__ = lambda *what: ([signal.raise_signal(number) for number in others], leave(*what))[1]
        obey_all()
        with project.open_run():
            signal.raise_signal(first)

    assert fork(work).end() == code
    assert [run.info.status for run in project.runs()] == ["KILLED"]


def test_a_signal_while_a_run_is_being_opened_ends_it_too(project, fork):
    def work():
        begin = tracking.Run.begin
        tracking.Run.begin = lambda *what, **more: (begin(*what, **more), signal.raise_signal(signal.SIGTERM))[0]
        obey_all()
        with project.open_run():
            pass

    assert fork(work).end() == 143
    assert [run.info.status for run in project.runs()] == ["KILLED"]


def test_a_run_killed_outright_resumes_without_double_points_and_without_gaps(project, fork):
    def work():
        run = project.open_run()
        run.log_epochs(project.history[:1])
        run.log_epochs(project.history[2:3])
        os.kill(os.getpid(), signal.SIGKILL)

    assert fork(work).end() == -signal.SIGKILL
    (killed,) = project.runs()
    assert killed.info.status == "RUNNING"
    with project.open_run(run_id=killed.info.run_id) as run:
        assert run.id == killed.info.run_id and project.entity(run.id).info.status == "RUNNING"
        for epoch in (3, 4, 5):
            run.log_epochs([record | {"new": 1.0} for record in project.history[:epoch]])
    for key in ("train/loss", "validation/accuracy", "new"):
        assert sorted(project.steps(run.id, key)) == [1, 2, 3, 4, 5]
    (resumed,) = project.runs()
    assert resumed.info.status == "FINISHED"


def test_resuming_a_killed_run_sets_it_running_again(project):
    with pytest.raises(KeyboardInterrupt), project.open_run() as run:
        raise KeyboardInterrupt
    changed = {"evaluate": {"epsilon": 0.1}, "regimes": {"AT": {"epochs": 6}}}
    resumed = project.open_run(run_id=run.id, parameters=project.parameters | changed)
    record = project.entity(run.id)
    assert (resumed.id, record.info.status) == (run.id, "RUNNING")
    assert record.data.params == project.compared | {"epsilon": "0.1", "norm": "linf"}  # MLflow refuses to change one
    assert record.data.tags["advml.now.training.finetune.epochs"] == "6"
    assert len(record.inputs.dataset_inputs) == 1


@pytest.mark.parametrize("lost", ["f" * 32, "not an id", "deleted", "of another experiment"])
def test_resuming_a_run_that_the_experiment_does_not_have_starts_a_new_one(project, lost, capfd):
    if lost == "deleted":
        with project.open_run() as run:
            lost = run.id
        project.store.client.delete_run(lost)
    if lost == "of another experiment":
        with project.having("tracking.experiment=other").open_run() as run:
            lost = run.id
    with project.open_run(run_id=lost) as run:
        run.log_epochs(project.history)
    assert run.id not in (lost, None)
    assert project.steps(run.id, "train/loss") == [1, 2, 3, 4, 5]
    assert capfd.readouterr() == ("", "")


def test_a_run_of_discarded_inputs_is_ended_and_no_other(project, capfd):
    orphan, done = project.open_run(), project.open_run()
    done.finish()
    for run_id in (orphan.id, done.id, "f" * 32):
        project.open_run(discarded=run_id).finish()
    assert project.entity(orphan.id).info.status == "KILLED"
    assert project.entity(done.id).info.status == "FINISHED"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("switch", ["true", "false"])
def test_the_machine_is_watched_if_mlflows_switch_is_on(project, monkeypatch, switch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", switch)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    with project.open_run() as run:
        deadline = time.monotonic() + 20
        while switch == "true" and not project.entity(run.id).data.metrics and time.monotonic() < deadline:
            time.sleep(0.05)
    measured = project.entity(run.id).data.metrics
    assert ("system/cpu_utilization_percentage" in measured) == (switch == "true") and project.entity(run.id).info.status == "FINISHED"
