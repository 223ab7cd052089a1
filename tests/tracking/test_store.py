"""Where the store is, how it is opened, and what a store that fails costs: SQLite files, dead and hanging servers, real kills."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from advml import tracking
from advml.core.errors import UserError


def test_the_store_is_where_params_yaml_says_else_the_environment_else_in_the_real_root(project, monkeypatch):
    root, elsewhere = project.root, project.having("tracking.uri=sqlite:///elsewhere/history.db")

    def place(of=project):
        found = of.place
        return found.uri, found.database, found.artifacts

    assert place() == (f"sqlite:///{root}/mlflow.db", root / "mlflow.db", root / "mlruns" / "advml")
    monkeypatch.setenv("DVC_ROOT", str(root / "real"))  # of a queue's worker
    assert place()[1] == root / "real" / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert place() == ("http://127.0.0.1:5000", None, None)
    assert place(elsewhere)[1:] == (root / "real" / "elsewhere" / "history.db", root / "real" / "elsewhere" / "mlruns" / "advml")


@pytest.mark.parametrize("name", ["a b", "a#b", "a%20b", "a?b", "grün"])
def test_a_folder_with_an_awkward_name_holds_its_store_and_its_artifacts(project, name):
    root = project.root / name
    root.mkdir()
    shutil.move(project.root / "mlflow.db", root)
    moved = type(project)(root)
    with moved.open_run() as run:
        run.log_table([{"a": 1}], "note.json")
    assert [found.info.status for found in moved.runs()] == ["FINISHED"]  # in the same experiment
    assert len(list((root / "mlruns" / "advml").rglob("note.json"))) == 1


def test_nothing_is_logged_to_the_default_experiment(project):
    with project.open_run() as run:
        pass
    experiment = project.store.client.get_experiment(project.entity(run.id).info.experiment_id)
    assert (experiment.name, experiment.artifact_location) == ("advml", (project.root / "mlruns" / "advml").as_uri())


def test_an_experiment_deleted_in_the_ui_comes_back_with_the_next_run(project, capfd):
    project.store.client.delete_experiment(project.store.experiment)
    with project.open_run() as run:
        pass
    assert project.entity(run.id).info.status == "FINISHED"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_project_writes_beside_itself_and_rebuilds_its_runs_there(project, tmp_path_factory, capfd, move):
    folder = project.write_model("CL-AT-s0", "model", digest="w" * 64)
    with project.open_run() as run:
        run.log_checkpoint(folder, digest="w" * 64)
    root = tmp_path_factory.mktemp("new") / "project"
    move(project.root, root)
    new = type(project)(root)
    before = sorted(project.root.rglob("*"))
    with new.open_run(run_id=run.id) as later:  # its state was moved, too
        later.log_table([{"a": 1}], "new.json")
    assert later.id != run.id and len(list(root.rglob("new.json"))) == 1
    assert new.sync() == ["CL-AT-s0"] and new.sync() == []
    rebuilt = new.store.find(digest="w" * 64)
    assert rebuilt.info.artifact_uri.startswith(root.as_uri()) and new.artifacts(rebuilt.info.run_id) == {"curves.png"}
    assert sorted(project.root.rglob("*")) == before
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and str(project.root) in told and "advml sync" in told
    client = new.store.client
    assert client.get_experiment_by_name(f"advml of {project.root}").experiment_id == client.get_run(run.id).info.experiment_id


def test_a_project_that_is_moved_back_has_its_runs_again(project, tmp_path_factory, capfd):
    with project.open_run() as run:
        pass
    away = shutil.move(project.root, tmp_path_factory.mktemp("away") / "project")
    with type(project)(away).open_run(name="SL-AT-s0"):
        pass
    shutil.move(away, project.root)
    assert [found.info.run_id for found in project.runs()] == [run.id]
    assert capfd.readouterr().err.count("note: ") == 2


def test_an_artifact_store_that_the_user_chose_stays(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere").as_uri()
    project.store.client.create_experiment("mine", artifact_location=elsewhere)
    mine = project.having("tracking.experiment=mine").store
    assert mine.client.get_experiment(mine.experiment).artifact_location == elsewhere


def test_four_processes_open_a_fresh_store_at_once_and_a_link_to_where_it_is_to_be_stays(project, fork):
    (database := project.root / "mlflow.db").unlink()
    database.symlink_to(project.root / "disk" / "history.db")

    def work():
        with project.open_run() as run:
            for epoch in range(20):
                run.log_epochs([{"epoch": epoch, "loss": 0.5}])

    children = [fork(work) for _ in range(4)]
    assert [child.end() for child in children] == [0] * 4
    runs = project.runs()
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    assert all(project.steps(run.info.run_id, "loss") == list(range(20)) for run in runs)
    assert database.is_symlink() and database.resolve() == project.root / "disk" / "history.db"


def test_a_process_killed_while_it_makes_the_store_leaves_nothing_broken(project, fork, capfd):
    (database := project.root / "mlflow.db").unlink()
    child = fork(project.open_run)
    child.wait_for(lambda: any(path.stat().st_size for path in project.root.glob("mlflow.db.new")))
    os.kill(child.pid, signal.SIGKILL)
    assert child.end() == -signal.SIGKILL
    assert not database.exists()
    logging.getLogger("mlflow").setLevel(logging.INFO)  # as where mlflow was imported before tracking could set it
    with project.open_run() as run:
        pass
    assert project.entity(run.id).info.status == "FINISHED"
    assert capfd.readouterr() == ("", "")


def test_importing_tracking_imports_neither_mlflow_nor_torch_and_sync_needs_no_torch(project):
    project.write_model("CL-at-s0", "pretrain", digest="a" * 64)
    code = (
        "import sys\nfrom pathlib import Path\nfrom advml import config, tracking\nfrom advml.config.store import locate\n"
        "assert not {'mlflow', 'torch'} & set(sys.modules)\n"
        "print(tracking.sync(locate(config.Tracking(experiment='advml'), root=Path(sys.argv[1]))))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, project.root], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['CL-at-s0']"


FOLDERS = ("./mlruns", "mlruns", "/data/my runs", "file:mlruns", "file:///data/mlruns")


@pytest.mark.parametrize("uri", FOLDERS)
@pytest.mark.parametrize("named", ["MLFLOW_TRACKING_URI", "tracking.uri"])
def test_a_folder_as_store_is_refused_in_one_whole_line_that_says_what_to_do(project, monkeypatch, capfd, uri, named):
    if named == "MLFLOW_TRACKING_URI":
        monkeypatch.setenv(named, uri)
    else:
        project = project.having(f"tracking.uri={uri}")
    before = sorted(project.root.iterdir())
    with pytest.raises(UserError) as refused:
        project.sync()
    told = str(refused.value)
    assert "\n" not in told and len(told) < 400
    assert told.startswith(f"{named} = {uri}") and "mlflow migrate-filestore" in told and "sqlite:///mlflow.db" in told
    for _ in range(2):
        tracking.warn_if_unusable(project.place)
    with project.open_run() as run:
        run.log_epochs(project.history)
    assert run.id is None and told in the_one_warning(capfd)
    assert sorted(project.root.iterdir()) == before


def test_databases_servers_and_folders_that_the_user_allows_are_not_refused(project, monkeypatch):
    for uri in ("sqlite:///mlflow.db", "http://127.0.0.1:9", "postgresql://host/name", "databricks", "databricks-uc"):
        assert project.having(f"tracking.uri={uri}").place.refused is None
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert project.having("tracking.uri=./mlruns").place.refused is None


def seconds_of_everything(project) -> float:
    """Of every call that a stage makes, on a store that does not work."""
    start = time.perf_counter()
    parent = {"name": "CL-at-s0", "digest": "a" * 64}
    with project.open_run(run_id="a" * 32, discarded="b" * 32, pretraining=parent) as run:
        run.log_epochs(project.history)
        tracking.log_model(run, project.root, digest="w" * 64)
    assert run.id == "a" * 32
    tracking.log_folder(project.place, project.root / "nowhere")
    with tracking.open_search(project.place, name="attack", identity="i", tags={}, params={}) as search:
        search.show([tracking.Trial(0, "complete", {})])
        search.mark_best(0)
        search.log_results(project.root, (), {})
    return time.perf_counter() - start


def the_one_warning(capfd) -> str:
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("warning: no tracking, ") and "advml sync" in err
    return err


def test_a_dead_server_costs_one_warning_and_little_time(project, capfd, caplog):
    assert seconds_of_everything(project.having("tracking.uri=http://user:secret@127.0.0.1:9")) < 10
    assert "secret" not in the_one_warning(capfd)
    assert caplog.text == ""


def test_a_server_that_never_answers_costs_its_timeout_once(project, capfd, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the user's own setting wins over the 4 s of DEFAULTS
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert seconds_of_everything(project.having(f"tracking.uri=http://127.0.0.1:{server.getsockname()[1]}")) < 10
    the_one_warning(capfd)


def test_a_server_gets_short_timeouts_unless_the_user_set_them(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    project.having("tracking.uri=http://127.0.0.1:9").open_run()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) <= 5


@pytest.mark.parametrize(
    "uri", ["sqlite:///mlflow.db", "mlruns", "sqlite:////dev/null/mlflow.db", "sqlite+pysqlite:////dev/null/x.db", "nonsense://x"]
)
def test_a_broken_store_costs_one_warning_and_no_training(project, capfd, uri):
    (project.root / "mlflow.db").write_bytes(b"no database at all" * 1000)
    assert seconds_of_everything(project.having(f"tracking.uri={uri}")) < 10
    the_one_warning(capfd)


def test_a_store_that_breaks_during_training_silences_the_run_and_is_not_asked_again(project, capfd, monkeypatch):
    with project.open_run() as run:
        run.log_epochs(project.history[:1])
        (project.root / "mlflow.db").write_bytes(b"no database at all" * 1000)
        run.log_epochs(project.history[:2])
        monkeypatch.setattr("mlflow.MlflowClient.log_batch", lambda *_, **__: pytest.fail("asked again"))
        run.log_epochs(project.history[:3])
        tracking.log_model(run, project.root, digest="w" * 64)
    the_one_warning(capfd)
