"""MLflow's UI: links to the right table, a local server with names and ports, and stores that are away."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from types import SimpleNamespace

import pytest

from advml.config import Tracking
from advml.config.store import Place, locate
from advml.core.errors import Failure, UserError
from advml.servers import mlflow_ui
from advml.tracking import store as stores


@pytest.fixture
def place_of(tmp_path, empty_store):
    """place_of(experiment="mine"): the store of a section `tracking`."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return lambda experiment="advml", uri=None: locate(Tracking(experiment=experiment, uri=uri), root=tmp_path)


@pytest.fixture
def place(place_of) -> Place:
    return place_of()


def test_the_ui_link_opens_the_experiments_table_of_results(place, place_of):
    experiment = stores.connect(place).experiment
    link = f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?viewStateShareKey=results&workflowType=machine_learning"
    assert mlflow_ui.link(place) == link
    view = json.loads(stores.connect(place).client.get_experiment(experiment).tags["mlflow.sharedViewState.results"])
    assert "metrics.`accuracy/clean`" in json.loads(view["state"])["selectedColumns"]
    assert mlflow_ui.link(place, port=5077).startswith("http://127.0.0.1:5077/#/")
    assert f"/experiments/{int(experiment) + 1}/" in mlflow_ui.link(place_of(experiment="unseen"))


def test_the_local_ui_opens_the_store_that_the_link_is_of(place, place_of):
    arguments, environment = mlflow_ui.command(place, port=5077)
    assert not {"MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"} & set(environment)  # MLflow's own: localhost
    assert arguments[1:4] == ["-m", "mlflow", "ui"] and arguments[-4:] == ["--host", "127.0.0.1", "--port", "5077"]
    assert environment["MLFLOW_BACKEND_STORE_URI"] == place.uri
    elsewhere = place_of(uri="sqlite:///elsewhere/history.db")
    assert mlflow_ui.command(elsewhere)[1]["MLFLOW_BACKEND_STORE_URI"].endswith("/elsewhere/history.db")
    assert mlflow_ui.command(place_of(uri="http://127.0.0.1:9")) is None


def test_the_link_of_a_store_that_is_away_is_its_address_or_the_reason(place_of, tmp_path, capfd):
    assert mlflow_ui.link(place_of(uri="http://127.0.0.1:9")) == "http://127.0.0.1:9" and "warning" in capfd.readouterr().err
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 1000)
    with pytest.raises(Failure, match=r"mlflow\.db: .*tracking\.uri"):
        mlflow_ui.link(place_of())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::"])
def test_a_ui_for_other_machines_takes_them_by_name_and_lets_its_own_page_search_runs(place, host, monkeypatch):
    from mlflow.server import security_utils as mlflow

    card = SimpleNamespace(family=socket.AF_INET, address="10.7.7.7")
    monkeypatch.setattr(
        "psutil.net_if_addrs", lambda: {"eth0": [card], "lo": [SimpleNamespace(family=socket.AF_INET, address="127.0.0.1")]}
    )

    def environment() -> dict[str, str]:
        return mlflow_ui.command(place, host=host, port=5077)[1]

    hosts, origins = (environment()[key].split(",") for key in ("MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"))
    for name in (socket.gethostname(), "127.0.0.1", "localhost", "10.7.7.7", *([host] if host[0] == "1" else [])):
        assert mlflow.is_allowed_host_header(hosts, f"{name}:5077")
        assert not mlflow.should_block_cors_request(f"http://{name}:5077", "POST", origins)
    for name in ("evil.example", "10.evil.example"):
        assert not mlflow.is_allowed_host_header(hosts, f"{name}:5077")
        assert mlflow.should_block_cors_request(f"http://{name}:5077", "POST", origins)
    shown = mlflow_ui.link(place, host=host, port=5077)
    assert shown.startswith(f"http://{host if host[0] == '1' else socket.gethostname()}:5077/#/")
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mine")
    assert environment()["MLFLOW_SERVER_ALLOWED_HOSTS"] == "mine"


def port_in_use() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_a_port_that_is_taken_is_named_with_the_next_one_that_is_free():
    with port_in_use() as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port} .*--port \d+") as refused:
            mlflow_ui.require_free("127.0.0.1", port)
    mlflow_ui.require_free("127.0.0.1", int(str(refused.value).split()[-1]))
    mlflow_ui.require_free("127.0.0.1", port)
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.7"):
        mlflow_ui.require_free("192.0.2.7", port)


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
        mlflow_ui.serve([sys.executable, "-c", SERVER, str(port)], os.environ, host="127.0.0.1", port=port, on_answer=interrupt)
    assert answered == [port]
    mlflow_ui.require_free("127.0.0.1", port)


def test_a_server_that_ends_with_an_error_shows_no_link():
    with port_in_use() as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(port), "3"]
    with pytest.raises(Failure, match="code 3"):
        mlflow_ui.serve(command, os.environ, host="127.0.0.1", port=port, on_answer=lambda: pytest.fail("it does not answer"))


def test_a_view_that_the_user_changed_stays(place):
    store = stores.connect(place)
    store.client.set_experiment_tag(store.experiment, "mlflow.sharedViewState.results", "mine")
    mlflow_ui.link(place)
    assert store.client.get_experiment(store.experiment).tags["mlflow.sharedViewState.results"] == "mine"
