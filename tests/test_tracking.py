"""Tracking against real stores: sqlite files in tmp_path, dead and hanging servers on loopback, real kills."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from advml import config as configuration
from advml import tracking
from advml.errors import Failure, UserError
from advml.paths import REPORT_FILES
from advml.runtime import processes
from advml.runtime.signals import ENDING, obey
from advml.tracking import runs, sqlite
from advml.tracking import store as stores

DATA = tracking.DataInfo(digest="d" * 64, source="scikit-learn digits", counts={"train": 1257, "validation": 180, "test": 360})
TAGS = {"scheme": "CL", "regime": "AT", "seed": 0}
HISTORY = [{"epoch": epoch, "train/loss": 1.0 / epoch, "validation/accuracy": 0.1 * epoch} for epoch in range(1, 6)]
PARAMS = Path(__file__).parents[1] / "params.yaml"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No setting of the machine, and no store given up in an earlier test, reaches the test."""
    for name in ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI", *stores.DEFAULTS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stores, "_broken", set())


@pytest.fixture
def config():
    return configuration.load(PARAMS)


@pytest.fixture
def root(tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def open_run(config, root, **changes):
    arguments = {"name": "CL-AT-s0", "kind": "model", "tags": TAGS, "params": {"attack": {"steps": 5, "step_size": None}}, "data": DATA}
    return tracking.open_run(config, root=root, **(arguments | changes))


def store_of(config, root):
    return stores.connect(stores.locate(config, root=root))


def record_of(config, root, run_id):
    return store_of(config, root).client.get_run(run_id)


def all_runs(config, root):
    store = store_of(config, root)
    return list(store.client.search_runs([store.experiment]))


def steps_of(config, root, run_id, key):
    return [point.step for point in store_of(config, root).client.get_metric_history(run_id, key)]


def forked(work):
    """A process that does `work` and no more, and leaves with its exit code; all that takes seconds to import is there already."""
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads; pytest-xdist has one, which waits
        child = os.fork()
    if child == 0:
        signal.alarm(120)
        code = 1
        try:
            work()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        finally:
            os._exit(code)
    return child


def end_of(child):
    """The exit code of a fork; minus the signal that it died of."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(condition, child):
    """Until it is true; the fork must not have ended before."""
    while not condition():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.005)


def write_model(root, name, kind, *, digest, pretraining=None, metrics=None):
    """The files that a training stage leaves behind."""
    scheme, *middle, seed = name.split("-")
    folder = root / "models" / ("pretrain" if kind == "pretrain" else "finetune") / name
    folder.mkdir(parents=True)
    facts = {
        "name": name,
        "kind": kind,
        "scheme": scheme,
        "phase" if kind == "pretrain" else "regime": "-".join(middle),
        "seed": int(seed[1:]),
        "parameters": {"attack": {"steps": 5}},
        "git_commit": "c" * 40,
        "data": {"digest": DATA.digest, "source": DATA.source, "counts": dict(DATA.counts)},
        "digest": digest,
        "pretraining": pretraining,
    }
    (folder / "model.json").write_text(json.dumps(facts))
    curves = root / "reports" / name / "history.json"
    curves.parent.mkdir(parents=True, exist_ok=True)
    curves.write_text(json.dumps(HISTORY))
    (folder / "model.safetensors").write_bytes(b"")
    os.utime(folder / "model.json", (1_000_000_100, 1_000_000_100))
    if metrics:
        write_report(root, name, metrics)
    return folder


def write_report(root, name, metrics):
    made, model = root / "records" / "evaluate" / f"{name}.json", root / "models" / "finetune" / name / "model.json"
    made.parent.mkdir(parents=True, exist_ok=True)
    told = {"parameters": {"evaluate": {"steps": 7}}, "diagnostics": {"evidence": {}, "flags": [{"name": "a flag"}]}}
    made.write_text(json.dumps({"digest": json.loads(model.read_text())["digest"], "metrics": metrics, **told}))


# --- where the store lies


def test_the_store_lies_in_the_workspace_and_in_a_queue_worker_in_the_real_root(config, tmp_path, monkeypatch):
    place = stores.locate(config, root=tmp_path)
    assert (place.database, place.artifacts) == (tmp_path / "mlflow.db", tmp_path / "mlruns" / "advml")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "real"))
    assert stores.locate(config, root=tmp_path).database == tmp_path / "real" / "mlflow.db"


def test_params_yaml_names_the_store_before_the_environment_does(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert stores.locate(config, root=tmp_path).uri == "http://127.0.0.1:5000"
    named = configuration.load(PARAMS, ["tracking.uri=sqlite:///elsewhere/history.db"])
    place = stores.locate(named, root=tmp_path)
    assert (place.database, place.artifacts) == (tmp_path / "elsewhere" / "history.db", tmp_path / "elsewhere" / "mlruns" / "advml")


@pytest.mark.parametrize("name", ["a b", "a#b", "a%20b", "a?b", "grün"])
def test_a_folder_with_an_awkward_name_holds_its_store_and_its_artifacts(config, tmp_path, empty_store, name):
    root = tmp_path / name
    root.mkdir()
    shutil.copy(empty_store, root / "mlflow.db")
    with open_run(config, root) as run:
        run.log_table([{"a": 1}], "note.json")
    assert record_of(config, root, run.id).info.status == "FINISHED"
    assert len(list((root / "mlruns" / "advml").rglob("note.json"))) == 1


def test_nothing_is_logged_to_the_default_experiment(config, root):
    with open_run(config, root) as run:
        pass
    experiment = store_of(config, root).client.get_experiment(record_of(config, root, run.id).info.experiment_id)
    assert (experiment.name, experiment.artifact_location) == ("advml", (root / "mlruns" / "advml").as_uri())


def test_an_experiment_deleted_in_the_ui_comes_back_with_the_next_run(config, root, capfd):
    store = store_of(config, root)
    store.client.delete_experiment(store.experiment)
    with open_run(config, root) as run:
        pass
    assert record_of(config, root, run.id).info.status == "FINISHED"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_project_reads_its_artifacts_and_writes_beside_them(config, root, tmp_path_factory, move):
    with open_run(config, root) as run:
        run.log_table([{"a": 1}], "old.json")
        run.log_checkpoint(root / "models", digest="w" * 64)
    new = tmp_path_factory.mktemp("new") / "project"
    move(root, new)
    tracking.ui_link(config, root=new)
    client = store_of(config, new).client
    assert [entry.path for entry in client.list_artifacts(run.id)] == ["old.json"]
    assert record_of(config, new, run.id).info.artifact_uri.startswith(new.as_uri())
    assert client.get_logged_model(record_of(config, new, run.id).data.tags["advml.model_id"]).artifact_location.startswith(new.as_uri())
    with open_run(config, new) as later:
        later.log_table([{"a": 1}], "new.json")
    assert len(list(new.rglob("new.json"))) == 1
    assert not list(root.rglob("new.json"))


def test_an_artifact_store_that_the_user_chose_stays(config, root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere").as_uri()
    store = store_of(config, root)
    store.client.create_experiment("mine", artifact_location=elsewhere)
    mine = configuration.load(PARAMS, ["tracking.experiment=mine"])
    assert store.client.get_experiment(store_of(mine, root).experiment).artifact_location == elsewhere


def test_four_processes_open_a_fresh_store_at_once(config, tmp_path):
    def work():
        with open_run(config, tmp_path) as run:
            for epoch in range(20):
                run.log_epochs([{"epoch": epoch, "loss": 0.5}])

    children = [forked(work) for _ in range(4)]
    assert [end_of(child) for child in children] == [0] * 4
    runs = all_runs(config, tmp_path)
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    assert all(steps_of(config, tmp_path, run.info.run_id, "loss") == list(range(20)) for run in runs)


def test_a_process_killed_while_it_makes_the_store_leaves_nothing_broken(config, tmp_path, capfd):
    child = forked(lambda: open_run(config, tmp_path))
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("mlflow.db.new")), child)
    os.kill(child, signal.SIGKILL)
    assert end_of(child) == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    logging.getLogger("mlflow").setLevel(logging.INFO)  # as where mlflow was imported before tracking could set it
    with open_run(config, tmp_path) as run:
        pass
    assert record_of(config, tmp_path, run.id).info.status == "FINISHED"
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("empty_store")  # which imports MLflow with its warnings off
def test_a_database_that_is_to_be_made_elsewhere_is_made_there_and_the_link_stays(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", lambda uri, _: made.append(uri) or touched(uri))
    (tmp_path / "mlflow.db").symlink_to(tmp_path / "disk" / "history.db")
    sqlite.create(tmp_path / "mlflow.db", artifacts=tmp_path / "mlruns" / "advml")
    assert (tmp_path / "mlflow.db").is_symlink() and (tmp_path / "disk" / "history.db").is_file()
    assert made == [sqlite.uri(tmp_path / "disk" / "history.db.new")]  # where it can be renamed


def touched(uri):
    """A store that makes an empty file."""
    Path(uri.removeprefix("sqlite:///")).touch()
    return SimpleNamespace(engine=SimpleNamespace(dispose=lambda: None))


def test_importing_tracking_imports_neither_mlflow_nor_torch_and_sync_needs_no_torch(root):
    write_model(root, "CL-at-s0", "pretrain", digest="a" * 64)
    code = (
        "import sys\nfrom pathlib import Path\nfrom advml import config, tracking\n"
        "assert not {'mlflow', 'torch'} & set(sys.modules)\n"
        f"print(tracking.sync(config.load({str(PARAMS)!r}), root=Path(sys.argv[1])))\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['CL-at-s0']"


# --- what a run holds


def test_a_run_carries_name_tags_parameters_data_and_commit(config, root, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=root, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "start"], cwd=root, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("DVC_STAGE", "finetune@CL-AT-s0")
    monkeypatch.setenv("DVC_EXP_NAME", "brave-name")
    (root / "params.yaml").write_text("seeds: [0]")
    subprocess.run([*git, "add", "params.yaml"], cwd=root, check=True)
    with open_run(config, root) as run:
        pass
    record = record_of(config, root, run.id)
    assert record.info.run_name == "CL-AT-s0"
    assert record.data.params == {"attack.steps": "5", "attack.step_size": "null"}
    expected = {
        "advml.name": "CL-AT-s0",
        "advml.kind": "model",
        "advml.scheme": "CL",
        "advml.regime": "AT",
        "advml.seed": "0",
        "advml.data_digest": DATA.digest,
        "advml.dvc_stage": "finetune@CL-AT-s0",
        "advml.dvc_experiment": "brave-name",
        "mlflow.source.git.commit": f"{commit}-dirty",
        "mlflow.source.name": "dvc repro finetune@CL-AT-s0",
    }
    assert expected.items() <= record.data.tags.items()
    assert record.data.tags["mlflow.user"]
    (used,) = record.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == (DATA.source, DATA.digest[:12])
    assert json.loads(used.dataset.profile) == DATA.counts


def test_parameters_beyond_mlflows_limits_are_logged_in_batches_and_cut(config, root, capfd):
    params = {f"key{number}": number for number in range(250)} | {"long": "x" * 9000}
    with open_run(config, root, params=params) as run:
        pass
    logged = record_of(config, root, run.id).data.params
    assert len(logged) == 251
    assert logged["long"] == "x" * 6000
    assert capfd.readouterr() == ("", "")


def counted(calls, name, method):
    def call(*args, **kwargs):
        calls.append(name)
        return method(*args, **kwargs)

    return call


def test_an_epoch_costs_one_call_and_no_read(config, root, monkeypatch):
    from mlflow import MlflowClient

    calls = []
    with open_run(config, root) as run:
        for name in ("log_batch", "get_metric_history", "get_run", "log_metric"):
            original = getattr(MlflowClient, name)
            monkeypatch.setattr(
                MlflowClient, name, lambda *a, _name=name, _original=original, **k: calls.append(_name) or _original(*a, **k)
            )
        for epoch in range(1, 4):
            run.log_epochs(HISTORY[:epoch])
        assert calls == ["log_batch"] * 3


def test_parameters_of_a_later_stage_are_added_and_none_is_changed(config, root, capfd):
    with open_run(config, root) as run:
        for steps in (20, 40):
            run.log_params({"evaluate": {"steps": steps, "epsilon": None}, "attack": {"steps": 7}})
    expected = {"attack.steps": "5", "attack.step_size": "null", "evaluate.steps": "20", "evaluate.epsilon": "null"}
    assert record_of(config, root, run.id).data.params == expected
    assert capfd.readouterr() == ("", "")


def test_parameters_that_have_changed_since_are_tags_and_part_of_the_description(config, root, capfd):
    def told() -> tuple[dict[str, str], str]:
        tags = record_of(config, root, run.id).data.tags
        return {key: value for key, value in tags.items() if key.startswith("advml.now.")}, tags.get("mlflow.note.content", "")

    with open_run(config, root) as run:
        run.log_params({"evaluate": {"steps": 20, "epsilon": None}})
        assert told()[0] == {} and "last measurement" not in told()[1]
        run.log_params({"evaluate": {"steps": 40, "epsilon": None}})
        assert told()[0] == {"advml.now.evaluate.steps": "40"} and told()[1].endswith("The last measurement took: `evaluate.steps` 40")
    with open_run(config, root, run_id=run.id) as run:
        run.log_params({"evaluate": {"steps": 20}})
        assert told()[0] == {} and "last measurement" not in told()[1]
    assert capfd.readouterr() == ("", "")


def test_values_that_are_no_numbers_are_left_out_of_curves_and_metrics(config, root):
    import numpy

    with open_run(config, root) as run:
        run.log_epochs([{"epoch": 1, "train/loss": numpy.float32(0.5), "note": "text", "absent": None}])
        run.log_metrics({"accuracy/clean": 0.5, "accuracy/threat_model_1": None})
    assert record_of(config, root, run.id).data.metrics == {"train/loss": 0.5, "accuracy/clean": 0.5}


def test_artifacts_of_every_kind_are_stored(config, root):
    import numpy
    from matplotlib.figure import Figure
    from PIL import Image

    Image.new("RGB", (8, 8)).save(root / "picture.png")
    with open_run(config, root, kind="study", name="study", data=None) as run:
        run.log_file(root / "picture.png", "figures")
        run.log_figure(Figure(), "figures/empty.png")
        run.log_image(root / "picture.png", key="picture")
        run.log_image(numpy.zeros((8, 8, 3), dtype=numpy.uint8), key="picture", step=1)
        for _ in range(2):
            run.log_table([{"model": "CL-AT-s0", "clean": 0.9}, {"model": "SL-AT-s0", "robust": 0.7}], "summary.json")
    client = store_of(config, root).client
    names = {entry.path for folder in (None, "figures") for entry in client.list_artifacts(run.id, folder)}
    assert {"summary.json", "figures/picture.png", "figures/empty.png"} <= names
    assert len(client.list_artifacts(run.id, "images")) == 4
    (file,) = (root / "mlruns").rglob("summary.json")
    table = json.loads(file.read_text())
    assert table == {"columns": ["model", "clean", "robust"], "data": [["CL-AT-s0", 0.9, None], ["SL-AT-s0", None, 0.7]]}
    assert json.loads(record_of(config, root, run.id).data.tags["mlflow.loggedArtifacts"]) == [{"path": "summary.json", "type": "table"}]


def test_a_checkpoint_is_an_external_model_with_path_digest_and_final_metrics(config, root):
    folder = write_model(root, "CL-AT-s0", "model", digest="w" * 64)
    with open_run(config, root) as run:
        run.log_checkpoint(folder, digest="w" * 64)
        run.log_checkpoint(folder, digest="w" * 64)
        run.log_metrics({"accuracy/clean": 0.9, "accuracy/clean/low": 0.8})
    store = store_of(config, root)
    (model,) = store.client.search_logged_models([store.experiment])
    assert (model.name, model.source_run_id, str(model.status)) == ("CL-AT-s0", run.id, "READY")
    assert model.params == {"path": "models/finetune/CL-AT-s0", "sha256": "w" * 64}
    assert model.tags["mlflow.model.isExternal"] == "true"
    assert {metric.key: metric.value for metric in model.metrics} == {"accuracy/clean": 0.9, "accuracy/clean/low": 0.8}
    assert {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics} == {(DATA.source, DATA.digest[:12])}
    assert [entry.path for entry in store.client.list_logged_model_artifacts(model.model_id)] == ["model.json"]
    record = record_of(config, root, run.id)
    assert [output.model_id for output in record.outputs.model_outputs] == [model.model_id]
    assert 'advml.load_model("models/finetune/CL-AT-s0")' in record.data.tags["mlflow.note.content"]


def test_a_run_is_complete_only_once_its_model_is_recorded(config, root, monkeypatch, capfd):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("advml.tracking.lineage.add_model", fail)
    with open_run(config, root) as run:
        run.log_checkpoint(root, digest="w" * 64)
    assert "disk full" in assert_one_warning(capfd)
    assert "advml.digest" not in record_of(config, root, run.id).data.tags


def test_a_model_links_to_the_run_that_pretrained_it(config, root):
    folder = write_model(root, "CL-at-s0", "pretrain", digest="p" * 64)
    with open_run(config, root, name="CL-at-s0", kind="pretrain") as pretraining:
        pretraining.log_checkpoint(folder, digest="p" * 64)
    with open_run(config, root) as run:
        run.link(tracking.find_run(config, root=root, digest="p" * 64, kind="pretrain"))
        run.link(None)
    record = record_of(config, root, run.id)
    assert record.data.tags["advml.pretraining_run"] == pretraining.id
    link = f"#/experiments/{record.info.experiment_id}/runs/{pretraining.id}?workflowType=machine_learning"
    assert record.data.tags["mlflow.note.content"] == f"Pretraining: [CL-at-s0]({link})"
    (used,) = record.inputs.model_inputs
    assert used.model_id == record_of(config, root, pretraining.id).data.tags["advml.model_id"]


def test_find_run_takes_the_newest_that_matches_everything(config, root):
    ids = []
    for digest in ("a" * 64, "a" * 64, "b" * 64):
        with open_run(config, root) as run:
            run.log_checkpoint(root, digest=digest)
        ids.append(run.id)
        time.sleep(0.002)  # runs are ordered by milliseconds
    assert tracking.find_run(config, root=root, name="CL-AT-s0") == ids[2]
    assert tracking.find_run(config, root=root, digest="a" * 64) == ids[1]
    assert tracking.find_run(config, root=root, digest="a" * 64, kind="pretrain") is None
    assert tracking.find_run(config, root=root, digest="c" * 64) is None


def test_the_ui_link_opens_the_experiments_table_of_results(config, root):
    experiment = store_of(config, root).experiment
    link = f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?viewStateShareKey=results&workflowType=machine_learning"
    assert tracking.ui_link(config, root=root) == link
    view = json.loads(store_of(config, root).client.get_experiment(experiment).tags["mlflow.sharedViewState.results"])
    assert "metrics.`accuracy/clean`" in json.loads(view["state"])["selectedColumns"]
    assert tracking.ui_link(config, root=root, port=5077).startswith("http://127.0.0.1:5077/#/")
    unseen = configuration.load(PARAMS, ["tracking.experiment=unseen"])
    assert f"/experiments/{int(experiment) + 1}/" in tracking.ui_link(unseen, root=root)


def test_the_local_ui_opens_the_store_that_the_link_is_of(config, root):
    arguments, environment = tracking.ui_command(config, root=root, port=5077)
    assert not {"MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"} & set(environment)  # MLflow's own: localhost
    assert arguments[1:4] == ["-m", "mlflow", "ui"] and arguments[-4:] == ["--host", "127.0.0.1", "--port", "5077"]
    assert environment["MLFLOW_BACKEND_STORE_URI"] == stores.locate(config, root=root).uri
    elsewhere = configuration.load(PARAMS, ["tracking.uri=sqlite:///elsewhere/history.db"])
    assert tracking.ui_command(elsewhere, root=root)[1]["MLFLOW_BACKEND_STORE_URI"].endswith("/elsewhere/history.db")
    assert tracking.ui_command(configuration.load(PARAMS, ["tracking.uri=http://127.0.0.1:9"]), root=root) is None


def test_the_link_of_a_store_that_is_away_is_its_address_or_the_reason(tmp_path, capfd):
    server = configuration.load(PARAMS, ["tracking.uri=http://127.0.0.1:9"])
    assert tracking.ui_link(server, root=tmp_path) == "http://127.0.0.1:9" and "warning" in capfd.readouterr().err
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 1000)
    with pytest.raises(Failure, match=r"mlflow\.db: .*tracking\.uri"):
        tracking.ui_link(configuration.load(PARAMS), root=tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::"])
def test_a_ui_for_other_machines_takes_them_by_name_and_lets_its_own_page_search_runs(config, root, host, monkeypatch):
    from mlflow.server import security_utils as mlflow

    card = SimpleNamespace(family=socket.AF_INET, address="10.7.7.7")
    monkeypatch.setattr(
        "psutil.net_if_addrs", lambda: {"eth0": [card], "lo": [SimpleNamespace(family=socket.AF_INET, address="127.0.0.1")]}
    )

    def environment() -> dict[str, str]:
        return tracking.ui_command(config, root=root, host=host, port=5077)[1]

    hosts, origins = (environment()[key].split(",") for key in ("MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"))
    for name in (socket.gethostname(), "127.0.0.1", "localhost", "10.7.7.7", *([host] if host[0] == "1" else [])):
        assert mlflow.is_allowed_host_header(hosts, f"{name}:5077")
        assert not mlflow.should_block_cors_request(f"http://{name}:5077", "POST", origins)
    for name in ("evil.example", "10.evil.example"):
        assert not mlflow.is_allowed_host_header(hosts, f"{name}:5077")
        assert mlflow.should_block_cors_request(f"http://{name}:5077", "POST", origins)
    shown = tracking.ui_link(config, root=root, host=host, port=5077)
    assert shown.startswith(f"http://{host if host[0] == '1' else socket.gethostname()}:5077/#/")
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mine")
    assert environment()["MLFLOW_SERVER_ALLOWED_HOSTS"] == "mine"


FOLDERS = ("./mlruns", "mlruns", "/data/my runs", "file:mlruns", "file:///data/mlruns")


@pytest.mark.parametrize("uri", FOLDERS)
@pytest.mark.parametrize("named", ["MLFLOW_TRACKING_URI", "tracking.uri"])
def test_a_folder_as_store_is_refused_in_one_whole_line_that_says_what_to_do(tmp_path, monkeypatch, capfd, uri, named):
    if named == "MLFLOW_TRACKING_URI":
        monkeypatch.setenv(named, uri)
    config = configuration.load(PARAMS, [f"tracking.uri={uri}"] if named == "tracking.uri" else [])
    with pytest.raises(UserError) as refused:
        tracking.require_usable(config, root=tmp_path)
    told = str(refused.value)
    assert "\n" not in told and len(told) < 400
    assert told.startswith(f"{named} = {uri}") and "mlflow migrate-filestore" in told and "sqlite:///mlflow.db" in told
    with pytest.raises(UserError, match=named):
        tracking.sync(config, root=tmp_path)
    for _ in range(2):
        tracking.warn_if_unusable(config, root=tmp_path)
    with open_run(config, tmp_path) as run:
        run.log_metrics({"accuracy/clean": 1.0})
    assert run.id is None and told in assert_one_warning(capfd)
    assert not list(tmp_path.iterdir())


def test_databases_servers_and_folders_that_the_user_allows_are_not_refused(tmp_path, monkeypatch):
    for uri in ("sqlite:///mlflow.db", "http://127.0.0.1:9", "postgresql://host/name", "databricks", "databricks-uc"):
        tracking.require_usable(configuration.load(PARAMS, [f"tracking.uri={uri}"]), root=tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking.require_usable(configuration.load(PARAMS, ["tracking.uri=./mlruns"]), root=tmp_path)


def port_in_use() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_a_port_that_is_taken_is_named_with_the_next_one_that_is_free():
    with port_in_use() as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port} is taken on 127\.0\.0\.1.*--port \d+") as refused:
            tracking.server.require_free("127.0.0.1", port)
    tracking.server.require_free("127.0.0.1", int(str(refused.value).split()[-1]))
    tracking.server.require_free("127.0.0.1", port)
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.7"):
        tracking.server.require_free("192.0.2.7", port)


# Answers after a moment, as MLflow does; and ends at once where it is told to.
SERVER = """
import http.server, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass

time.sleep(0.3)
if sys.argv[2:]:
    sys.exit(int(sys.argv[2]))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_the_link_is_shown_when_the_server_answers_and_the_server_ends_with_its_command():
    with port_in_use() as server:
        port = server.getsockname()[1]
    answered = []

    def interrupt() -> None:
        with socket.create_connection(("127.0.0.1", port)):
            answered.append(port)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracking.server.serve([sys.executable, "-c", SERVER, str(port)], os.environ, host="127.0.0.1", port=port, on_answer=interrupt)
    assert answered == [port]
    tracking.server.require_free("127.0.0.1", port)


def test_a_server_that_ends_with_an_error_shows_no_link():
    with port_in_use() as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(port), "3"]
    with pytest.raises(Failure, match="code 3"):
        tracking.server.serve(command, os.environ, host="127.0.0.1", port=port, on_answer=lambda: pytest.fail("it does not answer"))


def test_a_view_that_the_user_changed_stays(config, root):
    store = store_of(config, root)
    store.client.set_experiment_tag(store.experiment, "mlflow.sharedViewState.results", "mine")
    assert store_of(config, root).client.get_experiment(store.experiment).tags["mlflow.sharedViewState.results"] == "mine"


# --- ends and resumptions


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (Failure, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_run_that_ends_badly_says_how(config, root, error, status):
    with pytest.raises(error), open_run(config, root) as run:
        raise error
    assert record_of(config, root, run.id).info.status == status


def send(number):
    """To this process; the handler has run when this returns."""
    signal.raise_signal(number)


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
        ((signal.SIGINT, signal.SIGTERM, signal.SIGTERM), 1),  # a KeyboardInterrupt, for which `forked` has no code
    ],
    ids=lambda value: "+".join(one.name for one in value) if isinstance(value, tuple) else "",
)
def test_signals_end_the_run_as_killed_however_many_come_at_once(config, root, numbers, code):
    """The others arrive while the first one's exception is on its way, at the moment when the run is to be ended."""

    def work():
        first, *others = numbers
        leave = tracking.Run.__exit__
        tracking.Run.__exit__ = lambda *what: ([send(number) for number in others], leave(*what))[1]
        obey_all()
        with open_run(config, root):
            send(first)

    assert end_of(forked(work)) == code
    assert [run.info.status for run in all_runs(config, root)] == ["KILLED"]


def test_a_signal_while_a_run_is_being_opened_ends_it_too(config, root):
    def work():
        begin = runs.start
        runs.start = lambda *what, **more: (begin(*what, **more), send(signal.SIGTERM))[0]
        obey_all()
        with open_run(config, root):
            pass

    assert end_of(forked(work)) == 143
    assert [run.info.status for run in all_runs(config, root)] == ["KILLED"]


def test_a_signal_long_after_the_first_one_is_obeyed_again(monkeypatch):
    now = 100.0
    monkeypatch.setattr("advml.runtime.signals.time.monotonic", lambda: now)
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)  # as under nohup
        obey()
        with pytest.raises(SystemExit):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGHUP)
        now += 60
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_killed_outright_resumes_without_double_points_and_without_gaps(config, root):
    def work():
        run = open_run(config, root)
        run.log_epochs(HISTORY[:1])
        run.log_epochs(HISTORY[2:3])
        os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(forked(work)) == -signal.SIGKILL
    run_id = all_runs(config, root)[0].info.run_id
    assert record_of(config, root, run_id).info.status == "RUNNING"
    with open_run(config, root, run_id=run_id) as run:
        assert run.id == run_id
        assert record_of(config, root, run_id).info.status == "RUNNING"
        for epoch in (3, 4, 5):
            run.log_epochs([record | {"new": 1.0} for record in HISTORY[:epoch]])
    assert record_of(config, root, run_id).info.status == "FINISHED"
    for key in ("train/loss", "validation/accuracy", "new"):
        assert sorted(steps_of(config, root, run_id, key)) == [1, 2, 3, 4, 5]
    assert len(all_runs(config, root)) == 1


def test_resuming_a_killed_run_sets_it_running_again(config, root):
    with pytest.raises(KeyboardInterrupt), open_run(config, root) as run:
        raise KeyboardInterrupt
    resumed = open_run(config, root, run_id=run.id, params={"attack": {"steps": 6}, "late": 1})
    record = record_of(config, root, run.id)
    assert (resumed.id, record.info.status) == (run.id, "RUNNING")
    assert record.data.params == {"attack.steps": "5", "attack.step_size": "null", "late": "1"}  # MLflow refuses to change one
    assert len(record.inputs.dataset_inputs) == 1


@pytest.mark.parametrize("lost", ["f" * 32, "not an id", "deleted"])
def test_resuming_a_run_that_the_store_lost_starts_a_new_one(config, root, lost, capfd):
    if lost == "deleted":
        with open_run(config, root) as run:
            lost = run.id
        store_of(config, root).client.delete_run(lost)
    with open_run(config, root, run_id=lost) as run:
        run.log_epochs(HISTORY)
    assert run.id not in (lost, None)
    assert steps_of(config, root, run.id, "train/loss") == [1, 2, 3, 4, 5]
    assert capfd.readouterr() == ("", "")


def test_kill_run_ends_an_orphan_and_nothing_else(config, root, capfd):
    orphan, done = open_run(config, root), open_run(config, root)
    done.finish()
    for run_id in (orphan.id, done.id, "f" * 32):
        tracking.kill_run(config, root=root, run_id=run_id)
    assert record_of(config, root, orphan.id).info.status == "KILLED"
    assert record_of(config, root, done.id).info.status == "FINISHED"
    assert capfd.readouterr() == ("", "")


# --- stores that fail


def use_everything(config, root):
    """Every call a stage makes, on a store that does not work; returns the seconds it took."""
    start = time.perf_counter()
    with open_run(config, root, run_id="a" * 32) as run:
        run.log_epochs(HISTORY)
        run.link(tracking.find_run(config, root=root, name="CL-at-s0"))
        run.log_checkpoint(root, digest="w" * 64)
        run.log_metrics({"accuracy/clean": 0.9})
        run.log_params({"evaluate": {"steps": 20}})
        run.log_table([{"a": 1}], "table.json")
    assert run.id == "a" * 32
    tracking.kill_run(config, root=root, run_id="a" * 32)
    with tracking.attach_run(config, root=root, folder=root / "nowhere") as run:
        run.log_metrics({"accuracy/clean": 0.9})
    return time.perf_counter() - start


def assert_one_warning(capfd):
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("warning: no tracking, ")
    assert err.endswith("; training goes on, `advml sync` adds the run later\n")
    return err


def test_a_dead_server_costs_one_warning_and_little_time(tmp_path, capfd, caplog):
    config = configuration.load(PARAMS, ["tracking.uri=http://user:secret@127.0.0.1:9"])
    assert use_everything(config, tmp_path) < 10
    assert "secret" not in assert_one_warning(capfd)
    assert caplog.text == ""


def test_a_server_that_never_answers_costs_its_timeout_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the user's own setting wins over the 4 s of DEFAULTS
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = configuration.load(PARAMS, [f"tracking.uri=http://127.0.0.1:{server.getsockname()[1]}"])
        assert use_everything(config, tmp_path) < 10
    assert_one_warning(capfd)


def test_a_server_gets_short_timeouts_unless_the_user_set_them(tmp_path, monkeypatch):
    config = configuration.load(PARAMS, ["tracking.uri=http://127.0.0.1:9"])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    open_run(config, tmp_path)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) <= 5


@pytest.mark.parametrize(
    "uri", ["sqlite:///mlflow.db", "mlruns", "sqlite:////dev/null/mlflow.db", "sqlite+pysqlite:////dev/null/x.db", "nonsense://x"]
)
def test_a_broken_store_costs_one_warning_and_no_training(tmp_path, capfd, uri):
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 1000)
    assert use_everything(configuration.load(PARAMS, [f"tracking.uri={uri}"]), tmp_path) < 10
    assert_one_warning(capfd)


def test_a_store_that_breaks_during_training_silences_the_run(config, root, capfd):
    with open_run(config, root) as run:
        run.log_epochs(HISTORY[:1])
        (root / "mlflow.db").write_bytes(b"no database at all" * 1000)
        for epoch in (2, 3):
            run.log_epochs(HISTORY[:epoch])
        run.log_checkpoint(root, digest="w" * 64)
    assert_one_warning(capfd)


# --- sync


@pytest.fixture
def study(root):
    write_model(root, "CL-at-s0", "pretrain", digest="a" * 64)
    parent = {"name": "CL-at-s0", "digest": "a" * 64, "path": "models/pretrain/CL-at-s0"}
    write_model(root, "CL-AT-s0", "model", digest="b" * 64, pretraining=parent, metrics={"accuracy/clean": 0.9})
    write_model(root, "CL-Full-AT-s0", "model", digest="c" * 64, pretraining=parent)
    return root


def test_sync_rebuilds_everything_from_files_once(config, study):
    assert tracking.sync(config, root=study) == ["CL-at-s0", "CL-AT-s0", "CL-Full-AT-s0"]
    assert tracking.sync(config, root=study) == []
    runs = {record.info.run_name: record for record in all_runs(config, study)}
    assert set(runs) == {"CL-at-s0", "CL-AT-s0", "CL-Full-AT-s0"}
    record = runs["CL-AT-s0"]
    assert record.info.status == "FINISHED"
    assert (record.info.start_time, record.info.end_time) == (1_000_000_100_000, 1_000_000_100_000)
    assert record.data.params == {"attack.steps": "5", "evaluate.steps": "7"}
    assert record.data.metrics == {"accuracy/clean": 0.9, "train/loss": 0.2, "validation/accuracy": 0.5}
    assert steps_of(config, study, record.info.run_id, "train/loss") == [1, 2, 3, 4, 5]
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
    assert record.inputs.dataset_inputs[0].dataset.name == DATA.source
    client = store_of(config, study).client
    listed = client.list_artifacts(record.info.run_id, "records/evaluate")
    assert [entry.path for entry in listed] == ["records/evaluate/CL-AT-s0.json"]
    assert client.get_logged_model(record.data.tags["advml.model_id"]).metrics[0].key == "accuracy/clean"


def test_sync_leaves_a_run_that_training_made_and_adds_metrics_that_came_later(config, study):
    with open_run(config, study, name="CL-Full-AT-s0") as run:
        run.log_checkpoint(study / "models" / "finetune" / "CL-Full-AT-s0", digest="c" * 64)
    assert tracking.sync(config, root=study) == ["CL-at-s0", "CL-AT-s0", "CL-Full-AT-s0"]  # the last one lacked its curves
    write_report(study, "CL-Full-AT-s0", {"accuracy/clean": 0.8, "accuracy/threat_model_2": 0.4})
    before = record_of(config, study, run.id)
    assert [tracking.sync(config, root=study) for _ in range(2)] == [["CL-Full-AT-s0"], []]
    after = record_of(config, study, run.id)
    later = {"accuracy/clean": 0.8, "accuracy/threat_model_2": 0.4}
    assert after.data.metrics == later | {"train/loss": 0.2, "validation/accuracy": 0.5}  # of write_report, and of the curves
    assert steps_of(config, study, run.id, "accuracy/clean") == [0]
    assert after.data.params["evaluate.steps"] == "7" and after.data.tags["advml.flags"] == "a flag"  # of the record: see write_report
    assert (after.info.status, after.info.end_time) == (before.info.status, before.info.end_time)


def artifacts(config, root, run_id):
    return {entry.path for entry in store_of(config, root).client.list_artifacts(run_id)}


def test_curves_and_link_that_come_after_the_weights_are_added_once(config, study):
    """History that was pulled later, or written when the store had gone; a pretraining that the store had missed."""
    curves = study / "reports" / "CL-AT-s0" / "history.json"
    history = curves.rename(study / "later.json")
    with open_run(config, study) as run:
        run.log_checkpoint(study / "models" / "finetune" / "CL-AT-s0", digest="b" * 64)
    tracking.sync(config, root=study)
    assert "curves.png" not in artifacts(config, study, run.id) and steps_of(config, study, run.id, "train/loss") == []
    history.rename(curves)
    for changed in (["CL-AT-s0"], []):
        assert tracking.sync(config, root=study) == changed
        assert "curves.png" in artifacts(config, study, run.id) and steps_of(config, study, run.id, "train/loss") == [1, 2, 3, 4, 5]
    record = record_of(config, study, run.id)
    assert record.data.tags["advml.pretraining_name"] == "CL-at-s0" and len(record.inputs.model_inputs) == 1


def test_a_rebuilt_run_names_neither_stage_nor_experiment_of_the_process_that_rebuilds_it(config, study, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "evaluate_at@CL-AT-0")
    monkeypatch.setenv("DVC_EXP_NAME", "brave-name")
    with tracking.attach_run(config, root=study, folder=study / "models" / "finetune" / "CL-AT-s0") as run:
        tags = record_of(config, study, run.id).data.tags
    assert not {"advml.dvc_stage", "advml.dvc_experiment"} & set(tags) and tags["mlflow.source.name"] == "advml"


@pytest.fixture
def reported(root):
    """The files of `report`."""
    (root / "reports").mkdir(exist_ok=True)
    for name in REPORT_FILES:
        (root / "reports" / name).write_text("model,accuracy/clean,note\nCL-AT-s0,0.9,\n")
    made = {"git_commit": "c" * 40, "parameters": {"seeds": [0]}}
    (root / "reports" / "claims.json").write_text(json.dumps({"claims": [{"claim": "a", "verdict": "b", "parts": []}], **made}))
    return root


@pytest.mark.parametrize("method", ["log_batch", "log_artifact", "log_dict", "set_tag", "set_terminated"])
def test_an_outage_in_the_middle_of_a_result_is_mended_by_the_next_sync(config, reported, monkeypatch, method):
    from mlflow import MlflowClient

    def down(*_, **__):
        raise ConnectionError("down")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, method, down)
        with pytest.raises(Failure, match="down"):
            tracking.sync(config, root=reported)
    assert len(all_runs(config, reported)) == 1
    tracking.sync(config, root=reported)
    assert tracking.sync(config, root=reported) == []
    (record,) = all_runs(config, reported)
    assert record.info.status == "FINISHED" and record.data.params == {"seeds": "[0]"}
    assert artifacts(config, reported, record.info.run_id) == {*REPORT_FILES, "summary.json", "claims_table.json"}
    (file,) = (reported / "mlruns").rglob("summary.json")
    assert json.loads(file.read_text()) == {"columns": ["model", "accuracy/clean"], "data": [["CL-AT-s0", 0.9]]}


def test_a_result_of_other_files_is_a_new_run_and_one_that_is_not_whole_waits(config, reported):
    assert tracking.sync(config, root=reported) == ["study"]
    (reported / "reports" / "report.html").unlink()
    assert tracking.sync(config, root=reported) == []
    (reported / "reports" / "report.html").write_text("other")
    assert tracking.sync(config, root=reported) == ["study"]
    assert len(all_runs(config, reported)) == 2


def test_sync_makes_a_new_run_for_weights_that_were_trained_anew(config, study):
    tracking.sync(config, root=study)
    shutil.rmtree(study / "models" / "finetune" / "CL-AT-s0")
    write_model(study, "CL-AT-s0", "model", digest="e" * 64)
    assert tracking.sync(config, root=study) == ["CL-AT-s0"]
    anew = record_of(config, study, tracking.find_run(config, root=study, digest="e" * 64))
    assert "accuracy/clean" not in anew.data.metrics and "evaluate.steps" not in anew.data.params  # measured on the weights of before


def test_sync_ends_runs_whose_process_is_gone(config, study):
    orphan, done, alive, distant = (open_run(config, study) for _ in range(4))
    done.log_checkpoint(study, digest="f" * 64)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    client = store_of(config, study).client
    here = processes.machine()
    for run, machine in ((orphan, here), (done, here), (distant, here.replace(platform.node(), "elsewhere", 1))):
        client.set_tag(run.id, "advml.process", f"{machine}:{process.pid}:1")
    tracking.sync(config, root=study)
    ends = [record_of(config, study, run.id).info.status for run in (orphan, done, alive, distant)]
    assert ends == ["KILLED", "FINISHED", "RUNNING", "RUNNING"]


def test_attach_run_adds_to_the_run_of_a_folder_and_rebuilds_a_missing_one(config, study):
    folder = study / "models" / "finetune" / "CL-AT-s0"
    for value in (0.5, 0.5, 0.6):
        with tracking.attach_run(config, root=study, folder=folder) as run:
            run.log_metrics({"accuracy/clean": value})
    (record,) = all_runs(config, study)
    assert (record.info.run_id, record.info.status, record.data.metrics["accuracy/clean"]) == (run.id, "FINISHED", 0.6)
    assert len(steps_of(config, study, run.id, "accuracy/clean")) == 2
    with pytest.raises(ValueError, match="x"), tracking.attach_run(config, root=study, folder=folder):
        raise ValueError("x")
    assert record_of(config, study, run.id).info.status == "FINISHED"


def test_sync_says_in_one_line_why_it_cannot(config, study):
    dead = configuration.load(PARAMS, ["tracking.uri=http://127.0.0.1:9"])
    with pytest.raises(Failure, match=r"^http://127.0.0.1:9: .*tracking\.uri=\.\.\.$"):
        tracking.sync(dead, root=study)
    path = study / "models" / "finetune" / "CL-AT-s0" / "model.json"
    for text in ("{", '{"name": "CL-AT-s0"}'):
        path.write_text(text)
        with pytest.raises(Failure, match=rf"^{path} cannot be read: .*dvc checkout {path.parent}$"):
            tracking.sync(config, root=study)


# --- a value that changes in a file changes in MLflow


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_picture(path):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2)).save(path)


@pytest.fixture
def whole(config, study, reported):
    """A study with a file of every kind, and its runs."""
    reports, records = study / "reports", study / "records"
    representation = {"digest": "b" * 64, "cka": "k" * 64, "metrics": {"probe/clean": 0.6045, "cka/rankme": 2.5}}
    write_json(records / "represent" / "CL-AT-s0.json", representation | {"parameters": {"similarity": {"gram": "auto"}}})
    for folder in (reports / "CL-AT-s0", reports / "compare"):
        write_json(folder / "cka.json", {"panels": [], "probes": {"strengths": [1.0]}})
        (folder / "cka.npz").write_bytes(b"arrays")
        for name in ("cka", "layers", "clean", "adversarial"):
            write_picture(folder / f"{name}.png")
    block = {"seed": 0, "digests": {"CL-AT-s0": "b" * 64}, "breaks": [{"model": "CL-AT-s0", "transfer_breaks": 3}], "flags": []}
    write_json(reports / "transfer" / "transfer.json", {"seeds": [block]})
    (reports / "transfer" / "transfer.csv").write_text("source,target,n\nCL-AT-s0,CL-AT-s0,40\n")
    write_picture(reports / "transfer" / "transfer.png")
    write_json(reports / "mine" / "evaluation.json", {"metrics": {"accuracy/clean": 0.7}, "parameters": {"evaluate": {"steps": 7}}})
    (reports / "mine" / "samples.parquet").write_bytes(b"samples")
    (reports / "tune" / "attack").mkdir(parents=True)
    (reports / "tune" / "attack" / "best.yaml").write_text("parameters: {attack.steps: 5}\nscored: {robust: 0.57}\n")
    (reports / "tune" / "attack" / "trials.csv").write_text("trial,state,robust\n0,complete,0.57\n")
    tracking.sync(config, root=study)
    return study


# File, the value in it that changes, and what it becomes; the run, and where it must show the new value.
CHANGES = {
    "curves": ("reports/CL-AT-s0/history.json", "0.25", "0.26", "CL-AT-s0", ("curve", "train/loss", 4, 0.26)),
    "curves, at the end": ("reports/CL-AT-s0/history.json", "0.2,", "0.1,", "CL-AT-s0", ("metric", "train/loss", 0.1)),
    "model record": ("models/finetune/CL-AT-s0/model.json", '"steps": 5', '"steps": 6', "CL-AT-s0", ("tag", "advml.now.attack.steps", "6")),
    "commit": ("models/pretrain/CL-at-s0/model.json", "c" * 40, "d" * 40, "CL-at-s0", ("tag", "mlflow.source.git.commit", "d" * 40)),
    "evaluation": ("records/evaluate/CL-AT-s0.json", "0.9", "0.8", "CL-AT-s0", ("metric", "accuracy/clean", 0.8)),
    "flags": ("records/evaluate/CL-AT-s0.json", "a flag", "another", "CL-AT-s0", ("tag", "advml.flags", "another")),
    "probes": ("records/represent/CL-AT-s0.json", "0.6045", "0.621", "CL-AT-s0", ("metric", "probe/clean", 0.621)),
    "how it was measured": ("records/represent/CL-AT-s0.json", "auto", "low", "CL-AT-s0", ("tag", "advml.now.similarity.gram", "low")),
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


def test_a_value_that_changes_in_a_file_changes_in_mlflow(config, whole):
    assert tracking.sync(config, root=whole) == []
    for kind, (name, old, new, run, shown) in CHANGES.items():
        path = whole / name
        text = path.read_text()
        assert text.count(old) == 1, kind
        path.write_text(text.replace(old, new))
        assert tracking.sync(config, root=whole) == [run], kind
        assert is_shown(config, whole, run, path, *shown), kind
        assert tracking.sync(config, root=whole) == [], kind


def is_shown(config, root, name, file, what, key, *value):
    record = newest(config, root, name)
    if what == "curve":
        history = store_of(config, root).client.get_metric_history(record.info.run_id, key)
        at = [point.value for point in sorted(history, key=lambda point: point.timestamp) if point.step == value[0]]
        return at[-1] == value[1] and len(at) == 2  # the changed one, and no other a second time
    if what == "artifact":
        return (Path(record.info.artifact_uri.removeprefix("file://")) / key).read_bytes() == file.read_bytes()
    return {"metric": record.data.metrics, "tag": record.data.tags}[what][key] == value[0]


def newest(config, root, name):
    store = store_of(config, root)
    return store.client.search_runs([store.experiment], f"tags.`advml.name` = '{name}'", order_by=["attributes.start_time DESC"])[0]


def test_a_picture_that_has_not_changed_is_logged_once(config, whole):
    """Whatever else of the representation has, or an older version has called all of it by another digest."""
    store, run = store_of(config, whole), newest(config, whole, "CL-AT-s0").info.run_id

    def logged(key: str) -> int:
        return sum(entry.path.startswith(f"images/{key}+") for entry in store.client.list_artifacts(run, "images"))

    before = {key: logged(key) for key in ("cka", "layers")}
    store.client.set_tag(run, "advml.representation", "k" * 64)
    assert tracking.sync(config, root=whole) == ["CL-AT-s0"]
    assert {key: logged(key) for key in before} == before and all(before.values())
    (whole / "reports" / "CL-AT-s0" / "cka.png").write_bytes((whole / "reports" / "transfer" / "transfer.png").read_bytes() + b"\0")
    assert tracking.sync(config, root=whole) == ["CL-AT-s0"]
    assert logged("cka") == 2 * before["cka"] and logged("layers") == before["layers"]


def test_the_models_own_record_in_mlflow_is_that_of_the_file(config, whole):
    path = whole / "models" / "finetune" / "CL-AT-s0" / "model.json"
    path.write_text(path.read_text().replace('"steps": 5', '"steps": 6'))
    tracking.sync(config, root=whole)
    store = store_of(config, whole)
    model = store.client.get_logged_model(newest(config, whole, "CL-AT-s0").data.tags["advml.model_id"])
    assert Path(model.artifact_location.removeprefix("file://"), "model.json").read_bytes() == path.read_bytes()


def test_what_is_not_measured_any_more_is_nan_and_not_yesterdays_value(config, study):
    """MLflow deletes no metric."""
    for metrics in ({"accuracy/clean": 0.9, "corruption/mean": 0.8, "diagnostics/flags": 0}, {"accuracy/clean": 0.9}):
        write_report(study, "CL-AT-s0", metrics)
        tracking.sync(config, root=study)
    shown = newest(config, study, "CL-AT-s0").data.metrics
    assert shown["accuracy/clean"] == 0.9 and shown["train/loss"] == 0.2
    assert math.isnan(shown["corruption/mean"]) and math.isnan(shown["diagnostics/flags"])
    write_report(study, "CL-AT-s0", {"accuracy/clean": 0.9, "corruption/mean": 0.8})
    tracking.sync(config, root=study)
    assert newest(config, study, "CL-AT-s0").data.metrics["corruption/mean"] == 0.8


def test_a_search_that_is_at_work_is_left_to_its_own_command(config, whole):
    with tracking.open_search(config, root=whole, name="attack", identity="i", tags={}, params={}):
        path = whole / "reports" / "tune" / "attack" / "best.yaml"
        path.write_text(path.read_text().replace("0.57", "0.53"))
        assert tracking.sync(config, root=whole) == []
        assert newest(config, whole, "attack").info.status == "RUNNING"
    assert tracking.sync(config, root=whole) == ["attack"]
    assert newest(config, whole, "attack").data.metrics["best/robust"] == 0.53
