"""Servers that a group shares: MLflow on PostgreSQL with users and passwords (`advml server`), and a DVC remote in S3."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
import sqlalchemy
from werkzeug.security import generate_password_hash

from advml import tracking
from advml.core.errors import Failure, UserError
from advml.servers import mlflow_server, mlflow_ui
from advml.tracking import store as stores

SECRETS = SECRET, OF_ANN, OF_BOB, OF_THE_DATABASE, OF_THE_BUCKET = [
    f"S3cret-of-{who}" for who in ("admin", "ann", "bob", "database", "bucket")
]
REFUSED = "MLFLOW_TRACKING_PASSWORD"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def prepare(tmp_path, monkeypatch) -> Callable[..., mlflow_server.GroupServer]:
    monkeypatch.delenv(mlflow_server.PASSWORD, raising=False)
    monkeypatch.delenv(mlflow_server.BACKEND, raising=False)
    standard = {"folder": tmp_path / "server", "backend": None, "artifacts": None, "host": "127.0.0.1", "port": free_port()}
    return lambda **changes: mlflow_server.prepare(**(standard | changes))


def test_the_admins_password_is_made_once_and_only_its_owner_can_read_it(prepare, tmp_path):
    first, second = prepare(), prepare()
    file = tmp_path / "server" / "admin-password"
    password = file.read_text().strip()
    assert len(password) >= 24 and first.environment[mlflow_server.PASSWORD] == second.environment[mlflow_server.PASSWORD] == password
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert password not in " ".join([*first.command, *first.lines]) and str(file) in first.lines[0]


def test_a_folder_that_others_can_write_to_is_refused_and_an_empty_one_is_kept_out_of_git(prepare, tmp_path):
    (folder := tmp_path / "server").mkdir()
    folder.chmod(0o777)
    with pytest.raises(UserError, match=str(folder)):
        prepare()
    assert not any(folder.iterdir())
    folder.chmod(0o755)
    prepare()
    assert (folder / ".gitignore").read_text() == "*\n"


def test_a_given_password_is_kept_nowhere_and_a_later_one_is_said_not_to_count(prepare, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(mlflow_server.PASSWORD, SECRET)
    ready = prepare()
    assert ready.environment[mlflow_server.PASSWORD] == SECRET and [file.name for file in (tmp_path / "server").iterdir()] == [".gitignore"]
    with sqlite3.connect(tmp_path / "server" / "basic_auth.db") as database:
        database.execute("CREATE TABLE users (username, password_hash)")
        database.execute("INSERT INTO users VALUES ('admin', ?)", (generate_password_hash(SECRET),))
    prepare()
    assert "warning" not in capfd.readouterr().err
    monkeypatch.setenv(mlflow_server.PASSWORD, f"{SECRET}-other")
    prepare()
    said = capfd.readouterr().err
    assert f"warning: {mlflow_server.PASSWORD}" in said and SECRET not in said


@pytest.mark.parametrize(
    ("changes", "environment", "error", "told"),
    [
        ({"host": "0.0.0.0"}, {}, UserError, "--host 0.0.0.0.*--tls-cert"),
        ({"tls_cert": Path(__file__)}, {}, UserError, "--tls-key"),
        ({"backend": "nonsense"}, {}, UserError, "--backend 'nonsense'"),
        ({"backend": f"postgresql://ann:{SECRET}@127.0.0.1:1/runs"}, {}, UserError, mlflow_server.BACKEND),
        ({"backend": f"postgresql://127.0.0.1:1/runs?password={SECRET}"}, {}, UserError, mlflow_server.BACKEND),
        (
            {},
            {mlflow_server.BACKEND: f"postgresql://ann:{SECRET}@127.0.0.1:1/runs"},
            Failure,
            r"ann:\*\*\*@127.0.0.1:1/runs.*createdb runs",
        ),
        ({"backend": "sqlite:////nowhere/runs.db"}, {}, UserError, "--backend sqlite:////nowhere/runs.db: .* /nowhere;"),
        ({"backend": "sqlite:////"}, {}, UserError, "--backend sqlite:////: / is a folder"),
        ({"backend": "nothing+known://127.0.0.1/runs"}, {}, UserError, "--backend .nothing"),
        ({}, {mlflow_server.PASSWORD: "short"}, UserError, f"{mlflow_server.PASSWORD}.*12"),
        ({}, {mlflow_server.PASSWORD: "password1234"}, UserError, mlflow_server.PASSWORD),
    ],
)
def test_what_is_not_safe_or_not_there_is_refused_in_one_line(prepare, monkeypatch, changes, environment, error, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if mlflow_server.BACKEND in environment:
        changes = {"backend": environment[mlflow_server.BACKEND]}
    with pytest.raises(error, match=told) as refused:
        prepare(**changes)
    assert "\n" not in str(refused.value) and SECRET not in str(refused.value)


def test_a_damaged_database_of_users_is_named_with_the_remedy_and_left_alone(prepare, tmp_path):
    prepare()
    (file := tmp_path / "server" / "basic_auth.db").write_bytes(b"no database " * 1000)
    with pytest.raises(UserError, match=rf"^{file} is damaged .*remove it") as refused:
        prepare()
    assert "\n" not in str(refused.value) and file.read_bytes().startswith(b"no database")


def test_a_server_for_other_machines_speaks_https_and_takes_its_own_pages_requests(prepare, tmp_path):
    cert, key = tmp_path / "c e.pem", tmp_path / "key.pem"
    cert.touch(), key.touch()
    ready = prepare(host="0.0.0.0", tls_cert=cert, tls_key=key)
    assert f"'{cert}'" in ready.command[-1] and str(key) in ready.command[-1] and "MLflow: https://" in ready.lines[0]
    assert all(origin.startswith("https://") for origin in ready.environment["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(","))


@pytest.fixture
def locked() -> Iterator[str]:
    """The address of a server that refuses every request for want of a password."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_refused_password_ends_commands_before_their_work_and_costs_stages_one_warning(study, locked, capfd):
    place = study.place(f"tracking.uri={locked}")
    for action in (tracking.sync, mlflow_ui.link, tracking.warn_if_unusable):
        with pytest.raises(stores.Denied, match=REFUSED):
            action(place)
    with tracking.open_run(place, record={"name": "any", "kind": "model", "parameters": {}}) as run:
        assert run.id is None
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and REFUSED in said


@dataclass
class Lab:
    """A server for a group that is at work, and what it has printed."""

    address: str
    folder: Path
    process: subprocess.Popen
    log: Path
    backend: str | None

    def call(self, what: str, body: dict[str, str], user: tuple[str, str]) -> requests.Response:
        return requests.post(f"{self.address}/api/2.0/mlflow/{what}", json=body, auth=user, timeout=30)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def start(folder: Path, *arguments: str, **environment: str) -> Lab:
    port, log = free_port(), folder / "log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "advml", "server", "--port", str(port), *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=file,
            stderr=file,
        )
    deadline = time.monotonic() + 120
    while "\nnext: " not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    address = next(line.split()[1] for line in log.read_text().splitlines() if line.startswith("MLflow: "))
    return Lab(address, folder, process, log, environment.get(mlflow_server.BACKEND))


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """Environment in which s3://lab is a bucket of moto's server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": OF_THE_BUCKET, "AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client("s3", endpoint_url=address, aws_access_key_id="key", aws_secret_access_key="none").create_bucket(Bucket="lab")
    yield {**keys, "MLFLOW_S3_ENDPOINT_URL": address, "AWS_ENDPOINT_URL": address}
    server.stop()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, new_database, bucket) -> Iterator[Lab]:
    url = sqlalchemy.make_url(new_database()).set(password=OF_THE_DATABASE).render_as_string(hide_password=False)
    secrets = {mlflow_server.BACKEND: url, mlflow_server.PASSWORD: SECRET}
    lab = start(tmp_path_factory.mktemp("lab"), "--artifacts", "s3://lab/runs", **secrets, **bucket)
    yield lab
    lab.end()


@pytest.fixture
def ann(lab, monkeypatch) -> None:
    """Two new users of the server, one of them in the environment."""
    for user, password in (("ann", OF_ANN), ("bob", OF_BOB)):
        lab.call("users/create", {"username": user, "password": password}, ("admin", SECRET)).raise_for_status()
    for name, value in (("URI", lab.address), ("USERNAME", "ann"), ("PASSWORD", OF_ANN)):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)


def contents(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        yield from ((str(file), file.read_bytes()) for file in folder.rglob("*") if file.is_file())


@pytest.mark.postgres
def test_a_user_trains_and_no_password_is_written_anywhere(study, advml, lab, ann, bucket, tmp_path):
    import boto3
    from mlflow import MlflowClient

    done = advml.process("train", "SL", "ST", cwd=study.root)
    assert (done.returncode, "warning" in done.stderr) == (0, False), done.stderr
    assert study.runs() == [("SL-st-s0", "FINISHED"), ("SL-ST-s0", "FINISHED")]
    client = MlflowClient(lab.address)
    run = client.search_runs([client.get_experiment_by_name("advml").experiment_id], "attributes.run_name = 'SL-ST-s0'")[0]
    assert run.info.artifact_uri.startswith("mlflow-artifacts:") and run.data.metrics["accuracy/clean"] > 0
    s3 = boto3.client("s3", endpoint_url=bucket["AWS_ENDPOINT_URL"], aws_access_key_id="key", aws_secret_access_key="none")
    kept = [one["Key"] for one in s3.list_objects_v2(Bucket="lab", Prefix="runs/")["Contents"]]
    assert any(run.info.run_id in key for key in kept)
    assert Path(client.download_artifacts(run.info.run_id, "", str(tmp_path))).is_dir()  # through the server: no key of the bucket here

    for command in (["show", "SL-ST-s0"], ["sync"], ["ui"]):
        again = advml.process(*command, cwd=study.root)
        assert again.returncode == 0 and not again.stderr
        done.stdout += again.stdout
    assert "0 runs rebuilt" in done.stdout

    bob = ("bob", OF_BOB)
    assert lab.call("runs/create", {"experiment_id": run.info.experiment_id}, bob).status_code == 200  # a group shares an experiment
    assert lab.call("runs/delete", {"run_id": run.info.run_id}, bob).status_code == 403

    engine = sqlalchemy.create_engine(lab.backend)
    with engine.connect() as connection:
        tables = connection.execute(sqlalchemy.text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).scalars().all()
        rows = "".join(row for table in tables for row in connection.execute(sqlalchemy.text(f'SELECT t::text FROM "{table}" t')).scalars())
    engine.dispose()
    processes = [psutil.Process(lab.process.pid), *psutil.Process(lab.process.pid).children(recursive=True)]
    assert len(processes) >= 4 and run.info.run_id in rows
    seen = {
        "output": f"{done.stdout}{done.stderr}".encode(),
        "PostgreSQL": rows.encode(),
        "processes": repr([process.cmdline() for process in processes]).encode(),
        **{f"s3://{key}": s3.get_object(Bucket="lab", Key=key)["Body"].read() for key in kept},
        **dict(contents(study.root, lab.folder)),
    }
    assert [(place, secret) for place, text in seen.items() for secret in SECRETS if secret.encode() in text] == []


@pytest.mark.postgres
@pytest.mark.parametrize("password", [None, "S3cret-of-nobody"])
def test_a_wrong_or_missing_password_is_one_line(study, advml, lab, monkeypatch, password):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", lab.address)
    for name, value in (("USERNAME", "ann"), ("PASSWORD", password)) if password else ():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    for command in (["train", "SL", "ST"], ["repro"], ["sync"], ["ui"]):
        done = advml.process(*command, cwd=study.root)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert lab.address in done.stderr and REFUSED in done.stderr and "S3cret" not in done.stderr
    assert not study.workspace.models.exists()


@pytest.mark.servers
def test_without_options_runs_are_kept_in_the_folder_and_a_certificate_is_enough_for_https(study, advml, tmp_path, monkeypatch):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=lab"]
    subprocess.run([*new, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert], check=True, capture_output=True)
    lab = start(tmp_path, "--tls-cert", str(cert), "--tls-key", str(key), MLFLOW_WORKERS="1")
    children = psutil.Process(lab.process.pid).children(recursive=True)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", lab.address)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", (tmp_path / "mlflow-server" / "admin-password").read_text().strip())
        assert advml.process("sync", cwd=study.root).returncode == 1  # whose certificate is it?
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(cert))
        done = advml.process("sync", cwd=study.root)
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        lab.end()
    assert lab.address.startswith("https://") and psutil.wait_procs(children, timeout=30)[1] == []
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "mlflow-server").glob("*.db")) and "note: " in lab.log.read_text()


@pytest.mark.servers
def test_results_go_to_a_dvc_remote_in_s3_and_come_back_the_same(tmp_path, bucket, monkeypatch):
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)

    def dvc(*arguments: str) -> None:
        done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def digests() -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / "models").rglob("*.bin"))}

    (tmp_path / "make.py").write_text(
        "import os, pathlib\nmodels = pathlib.Path('models')\nmodels.mkdir()\n"
        "for name in 'abc':\n    (models / f'{name}.bin').write_bytes(os.urandom(100_000))\n"
    )
    dvc("init", "--no-scm", "--quiet")
    dvc("stage", "add", "--run", "--name", "make", "--outs", "models", "python make.py")
    dvc("remote", "add", "--default", "lab", "s3://lab/dvc")
    before = digests()
    dvc("push")
    shutil.rmtree(tmp_path / "models")
    shutil.rmtree(tmp_path / ".dvc" / "cache")
    dvc("pull")
    assert len(before) == 3 and digests() == before
