"""No password reaches a terminal, a log or a file, whatever form its address has and whoever quotes it."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
import typer

from advml import config
from advml.cli import app
from advml.cli.errors import guarded
from advml.config.presets import preset
from advml.core import passwords
from advml.core.errors import UserError
from advml.core.passwords import masked, remember
from advml.pipeline.stages import pretrain
from advml.tracking import store as stores
from advml.tuning.storage import address, alone

ADDRESSES = {
    "plain": "postgresql://ann:S3CRET@127.0.0.1:1/x",
    "a driver": "mysql+pymysql://ann:S3CRET@127.0.0.1:1/x",
    "a slash": "postgresql://ann:S3CRET/q@127.0.0.1:1/x",
    "a slash before": "postgresql://ann:q/S3CRET@127.0.0.1:1/x",
    "an @": "postgresql://ann:a@S3CRET@127.0.0.1:1/x",
    "an encoded @": "postgresql://ann:a%40S3CRET@127.0.0.1:1/x",
    "a colon and a question mark": "postgresql://ann:a:?S3CRET#@127.0.0.1:1/x",
    "in the query": "postgresql://127.0.0.1:1/x?user=ann&password=S3CRET",
    "with an ampersand": "postgresql://127.0.0.1:1/x?password=a&S3CRET&user=ann",
    "of a certificate": "postgresql://127.0.0.1:1/x?sslmode=require&sslpassword=S3CRET",
    "a socket": "postgresql://ann:S3CRET@/x?host=/nowhere",
    "a DSN": "mssql+pyodbc:///?odbc_connect=DRIVER={X};UID=ann;PWD=S3CRET;Server=127.0.0.1",
    "an encoded DSN": "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BX%7D%3BUID%3Dann%3BPWD%3DS3CRET%3B",
    "a server": "http://ann:S3CRET@127.0.0.1:1",
    "a token": "http://S3CRET@127.0.0.1:1",
    "databricks": "databricks://token:S3CRET@127.0.0.1",
    "one slash": "postgresql:/ann:S3CRET@127.0.0.1:1/x",
    "no host": "postgresql://ann:S3CRET",
}
REMEMBERED = {"one slash"}  # only known for an address because a setting holds it


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_remembered", set())


@pytest.mark.parametrize("form", [form for form in ADDRESSES if form not in REMEMBERED])
def test_an_address_is_masked_wherever_it_stands(form: str) -> None:
    for text in ("{}", "cannot open '{}': refused", '{{"uri": "{}"}}', "(x, {}) and more", "-S tracking.uri={}"):
        assert "S3CRET" not in masked(text.format(ADDRESSES[form])), text


@pytest.mark.parametrize("form", [form for form in ADDRESSES if form not in REMEMBERED | {"a token", "an @"}])
def test_an_address_that_was_cut_is_masked_too(form: str) -> None:
    """What nobody can tell: whether a word before the cut is a host, or the rest of a password with an @."""
    whole = ADDRESSES[form]
    for end in range(whole.index("S3C") + 3, len(whole)):
        assert "S3C" not in masked(whole[:end]), whole[:end]


@pytest.mark.parametrize("form", ADDRESSES)
def test_the_secrets_of_addresses_in_use_are_masked_by_their_value(form: str) -> None:
    remember(ADDRESSES[form])
    for text in ("Port could not be cast to integer value as 'S3CRET'", "no host a@S3CRET", "invalid S3CRET%23, S3CRET/q", ADDRESSES[form]):
        assert "S3CRET" not in masked(text)


def test_what_holds_no_secret_stays_as_it_is() -> None:
    for text in (
        "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning is down; run: advml ui",
        "http://[::1]:5000/x, https://github.com/a/b@v1, sqlite:///a/b@c.db, postgresql://ann@host:5432/x, me@host.com: no such file",
        "forward pass = 3 steps, token = 5; choose another, sig=3, s3://bucket:x/y, gs://bucket:x, 2 s3://b:x; s3://b",
        "# model.options.class_token = False; -S model.options.class_token=false; passes=3, 4 passes in 2:30",
    ):
        assert masked(text) == text


def test_passwords_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "S3CRET")
    monkeypatch.setenv("PWD", "/home/ann")
    assert masked("server said: S3CRET, in /home/ann") == "server said: ***, in /home/ann"


def test_a_password_that_is_a_word_is_masked_in_addresses_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "mlflow")
    remember("postgresql://mlflow:mlflow@host/mlflow")
    assert masked("mlflow.db cannot be opened; start: mlflow ui") == "mlflow.db cannot be opened; start: mlflow ui"
    assert masked("postgresql://mlflow:mlflow@host/mlflow is down") == "postgresql://mlflow:***@host/mlflow is down"
    monkeypatch.setenv("POSTGRES_PASSWORD", "correcthorsebattery")
    assert masked("no correcthorsebattery, a%40correcthorsebattery") == "no ***, a%40***"


def test_words_that_are_names_of_secrets_too_count_in_addresses() -> None:
    for text in (
        "http://h/x?sig=S3CRET",
        "x?a=b&token=S3CRET",
        "h/x;pass=S3CRET",
        "token=S3CRET",
        "token= S3CRET",
        "session_token = S3CRET",
        "x?sig%3DS3CRET",
    ):
        assert "S3CRET" not in masked(text), text


@pytest.mark.parametrize(
    "part", ["a.", "a://b:", "a://b:'", "a://b:1/", "password", "password={ ", "password='", "x;", "pass=&a", "%3D", "http://a"]
)
def test_a_long_text_is_masked_in_a_time_of_its_length(part: str) -> None:
    text = 20_000 * part
    begin = time.process_time()
    masked(text)
    assert time.process_time() - begin < 1.5


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """All that a command prints."""
    with pytest.raises(SystemExit):
        guarded(lambda: app(args=list(arguments), standalone_mode=False))
    return "".join(capsys.readouterr())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are not there are given up at the first attempt."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


# What each library quotes of an address in its own errors; all other forms are masked alike.
@pytest.mark.parametrize("form", ["plain", "a slash", "an @", "in the query", "a DSN", "a token", "databricks", "one slash"])
def test_no_command_prints_a_password(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    url, params = ADDRESSES[form], tmp_path / "params.yaml"
    params.write_text(preset("digits"), encoding="utf-8")
    here, uri = ("--params", str(params)), ("-S", f"tracking.uri='{url}'")
    said = [
        told(capsys, *command, *here, *uri)
        for command in (("evaluate", "SL", "ST"), ("represent", "SL", "ST"), ("attack", "x.png", "--model", "x"), ("link",))
    ]
    monkeypatch.setattr(stores, "_broken", set())
    said += [told(capsys, "sync", *here, *uri), told(capsys, "repro", *here, *uri), told(capsys, "repro", f"--params={url}")]
    said += [
        told(capsys, "link", *here, "-S", f"tracking={{uri: '{url}', experiment: 3}}"),
        told(capsys, "link", *here, "-S", f"x.uri={url}"),
    ]
    said += [told(capsys, "tune", "attack", "x", *here, "--storage", url), told(capsys, "link", *here, f"--tracking={url}")]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setattr(stores, "_broken", set())
    said += [told(capsys, "link", *here)]
    params.write_text(
        preset("digits", full=True).replace("  uri: null", f"  uri: '{url}'").replace("seeds: [0]", "seeds: [a]"), encoding="utf-8"
    )
    said += [told(capsys, "sync", *here)]
    for number, text in enumerate(said):
        assert text and "S3CRET" not in text, (number, text)
        assert "Traceback" not in text, (number, text)


@pytest.mark.parametrize("form", ADDRESSES)
def test_a_storage_of_searches_is_told_without_its_password(form: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, alone(address(ADDRESSES[form], root=tmp_path), "study"):
        pass
    assert "S3CRET" not in str(caught.value) and re.match("--storage ", str(caught.value))


def test_an_unforeseen_error_keeps_its_traceback_but_no_password(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = typer.Typer(pretty_exceptions_enable=False)  # which replaces `sys.excepthook`

    @one.command()
    def fail() -> None:
        raise ValueError(ADDRESSES["plain"])

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        guarded(lambda: one(args=[], standalone_mode=False))
    except ValueError:
        sys.excepthook(*sys.exc_info())
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "postgresql://ann:***@127.0.0.1:1/x" in said and "S3CRET" not in said


def test_no_file_of_a_study_holds_the_password_of_its_store(make_study) -> None:
    study = make_study("study")
    pretrain.run(
        study.context("tracking.uri='sqlite:///mlflow.db?password=S3CRET'", "pretrain.SL.epochs=1"), scheme="SL", phase="st", seed=0
    )
    assert [name for name, _ in study.runs()] == ["SL-st-s0"]
    assert not [path for path in study.root.rglob("*") if path.is_file() and b"S3CRET" in path.read_bytes()]


def test_a_configuration_is_told_without_the_password_that_its_uri_holds() -> None:
    with pytest.raises(UserError) as caught:
        config.validate(config.apply(preset("digits"), ["tracking={uri: 'postgresql://ann:" + 40 * "S3CRET" + "@h/x', no: 1}"]))
    assert "S3C" not in masked(str(caught.value))
