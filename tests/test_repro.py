"""`advml repro`: which stages run, how many at a time, and what is said when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from advml import repro as module
from advml.config.presets import preset
from advml.engine import stage_task
from advml.engine.cluster import Slots
from advml.errors import Failure, UserError
from advml.repro import repro

# A stage waits until the other one has begun: they end only if they overlap.
MEET = "touch {0}.begun; for i in $(seq 300); do test -e {1}.begun && echo {0} > {0} && exit 0; sleep 0.1; done; exit 1"
# A failure stops what has not begun, so the stage that fails waits for the one that must run beside it.
AWAIT = "for i in $(seq 300); do test -e {0}.begun && break; sleep 0.1; done"
REPORTING = """
import json, os, sys, time
with open(os.environ["ADVML_BOARD"], "w") as file:
    file.write('{"title": "the wo')
    file.flush()
    time.sleep(0.3)
with open(os.environ["ADVML_BOARD"], "w") as file:
    json.dump({"title": "the work", "done": 3, "total": 4, "note": "nearly"}, file)
time.sleep(0.5)
print(sys.executable, file=open("after", "w"))
"""


def pipeline(root: Path, stages: dict[str, dict]) -> None:
    """A DVC repository with these stages."""
    (root / ".dvc").mkdir(exist_ok=True)
    (root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    with (root / "dvc.yaml").open("w") as file:
        YAML(typ="safe").dump({"stages": stages}, file)


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    """These stages import nothing that could be kept warm."""
    monkeypatch.setattr(module, "server", lambda root: contextlib.nullcontext({}))


class Seen(module.Board):
    """A board that remembers what it was told."""

    states: list[tuple[str, dict]]
    ended: list[tuple[str, bool]]

    def __init__(self, *, total: int) -> None:
        super().__init__(total=total)
        Seen.states, Seen.ended, Seen.planned = [], [], total

    def show(self, name: str, state: dict) -> None:
        self.states.append((name, state))

    def finish(self, name: str, *, ok: bool, seconds: float) -> None:
        self.ended.append((name, ok))


# With DVC


def test_stages_overlap_a_failure_keeps_what_is_done_and_the_next_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "Board", Seen)
    (tmp_path / "reporting.py").write_text(REPORTING)
    bad = f"{AWAIT.format('after')}; test -e mended || {{ echo 'advml: boom; mend it' >&2; exit 2; }}; echo bad > bad"
    pipeline(
        tmp_path,
        {
            "left": {"cmd": "echo 'note: odd images'; " + MEET.format("left", "right"), "outs": ["left"]},
            "right": {"cmd": MEET.format("right", "left"), "outs": ["right"]},
            "after": {"cmd": "touch after.begun; python reporting.py", "deps": ["right"], "outs": ["after"]},
            "bad": {"cmd": bad, "deps": ["left"], "outs": ["bad"]},
            "behind": {"cmd": "cat bad after > behind", "deps": ["bad", "after"], "outs": ["behind"]},
        },
    )
    with pytest.raises(Failure) as failed:
        repro(tmp_path, jobs=2)
    log = tmp_path / ".scratch" / "repro" / "bad.log"
    assert str(failed.value) == f"stage bad failed: boom; mend it (whole output: {log}); after mending, the same command goes on"
    assert "boom" in log.read_text()
    assert "note: odd images" in capsys.readouterr().err.splitlines()
    # What ran beside it was finished and is kept; what needs it was not begun.
    assert Seen.planned == 5 and sorted(Seen.ended) == [("after", True), ("bad", False), ("left", True), ("right", True)]
    assert set(YAML(typ="safe").load(tmp_path / "dvc.lock")["stages"]) == {"left", "right", "after"}
    # Progress came through the file; half a file showed nothing; no file is left behind.
    states = [state for name, state in Seen.states if name == "after"]
    assert {} in states and {"title": "the work", "done": 3, "total": 4, "note": "nearly"} in states
    assert not list((tmp_path / ".scratch" / "repro").glob("*.progress"))
    # Stages say `python` and get the one that runs advml, whatever is on PATH.
    assert (tmp_path / "after").read_text().strip() == sys.executable

    (tmp_path / "mended").touch()
    assert repro(tmp_path, jobs=2) == ["bad", "behind"]
    assert (tmp_path / "behind").read_text() == f"bad\n{sys.executable}\n"
    assert repro(tmp_path, jobs=2) == []


# `advml repro` without the server, which would import torch for a stage that needs none.
SERVERLESS = """
import contextlib, sys
from advml import cli, repro
repro.server = lambda root: contextlib.nullcontext({})
sys.argv = ["advml", "repro", "--jobs", "2"]
cli.main()
"""


def test_a_terminated_command_leaves_no_stage_at_work(tmp_path):
    pipeline(tmp_path, {"slow": {"cmd": "echo $$ > pid; sleep 300; echo > never", "outs": ["never"]}})
    (tmp_path / "params.yaml").write_text(preset("digits"))
    process = subprocess.Popen([sys.executable, "-c", SERVERLESS], cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    shell = psutil.Process(int((tmp_path / "pid").read_text()))
    family = [shell, *shell.children()]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert psutil.wait_procs(family, timeout=5)[1] == []


def test_without_a_pipeline_dvcs_own_word_is_passed_on(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (tmp_path / "dvc.yaml").write_text("stages: [no, mapping]\n")
    with pytest.raises(UserError) as stopped:
        repro(tmp_path, jobs=1)
    assert str(stopped.value).startswith("dvc: ") and "\n" not in str(stopped.value)


# The plan


def test_the_plan_reaches_all_the_way_back_and_knows_matrix_names_and_what_lies_behind_a_change(tmp_path):
    (tmp_path / "raw").write_text("1")
    make = {"matrix": {"n": [0, 1]}, "cmd": "cat first > made-${item.n}", "deps": ["first"], "outs": ["made-${item.n}"]}
    pipeline(
        tmp_path,
        {
            "join": {"cmd": "cat made-0 made-1 > joined", "deps": ["made-0", "made-1"], "outs": ["joined"]},
            "make": make,
            "first": {"cmd": "cat raw > first", "deps": ["raw"], "outs": ["first"]},
            "alone": {"cmd": "echo 1 > alone", "outs": ["alone"]},
        },
    )
    upstream, outdated = module._plan(tmp_path)
    assert upstream == {"join": {"make@0", "make@1", "first"}, "make@0": {"first"}, "make@1": {"first"}, "first": set(), "alone": set()}
    assert outdated == ["alone", "first", "join", "make@0", "make@1"]
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=tmp_path, check=True)
    assert module._plan(tmp_path)[1] == []
    (tmp_path / "made-1").write_text("2")
    # What turns out to be as it was has not run: once made again, `made-1` is what `join` has seen.
    assert module._plan(tmp_path)[1] == ["join", "make@1"] and "join" not in repro(tmp_path, jobs=1)


def test_other_pipelines_that_need_this_one_are_not_run_with_it(tmp_path):
    pipeline(tmp_path, {"first": {"cmd": "echo 1 > first", "outs": ["first"]}})
    (other := tmp_path / "pipelines" / "other").mkdir(parents=True)
    (other / "dvc.yaml").write_text("stages: {behind: {cmd: cp ../../first behind, deps: [../../first], outs: [behind]}}")
    assert module._plan(tmp_path) == ({"first": set()}, ["first"])
    assert repro(tmp_path, jobs=1) == ["first"] and not (other / "behind").exists()


# The order, with commands in place of DVC


class Finished:
    """What the driver sees of a task that `FakeClient` runs in a thread."""

    def __init__(self, work: Callable[[], int]) -> None:
        self.code: int | None = None
        self.thread = threading.Thread(target=lambda: setattr(self, "code", work()))
        self.thread.start()

    status = "finished"

    def done(self) -> bool:
        return self.code is not None

    def result(self) -> int:
        return self.code


class FakeClient:
    """Runs stages as short shell commands; remembers their order and how many ran at once."""

    def __init__(self, slots: int) -> None:
        self.commands = {"fails": "echo 'ERROR: it broke'; exit 3", "slow": "sleep 0.6"}
        self.slots, self.order, self.most, self.tasks = slots, [], 0, []

    def nthreads(self) -> dict[str, int]:
        return {"worker": self.slots}

    def submit(self, _: object, name: str, *, root: str, **__: object) -> Finished:
        def work() -> int:
            with (Path(root) / stage_task.FOLDER / f"{name}.log").open("wb") as output:
                command = f"echo \"Running stage '{name}':\"; {self.commands.get(name, 'sleep 0.15')}"
                return subprocess.run(["sh", "-c", command], stdout=output, check=False).returncode

        self.order.append(name)
        self.tasks.append(Finished(work))
        self.most = max(self.most, sum(not task.done() for task in self.tasks))
        return self.tasks[-1]

    def cancel(self, _: object) -> None: ...

    def run(self, _: object, **__: object) -> None: ...


@pytest.fixture
def client(monkeypatch, tmp_path) -> FakeClient:
    client = FakeClient(2)
    (tmp_path / stage_task.FOLDER).mkdir(parents=True)
    monkeypatch.setattr(module, "connect", lambda *_, **__: contextlib.nullcontext(Slots(client, "token")))
    return client


def plan(monkeypatch, upstream: dict[str, set[str]]) -> None:
    monkeypatch.setattr(module, "_plan", lambda root: (upstream, list(upstream)))


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_never_more_stages_than_slots_and_never_one_before_what_it_needs(monkeypatch, tmp_path, client, jobs):
    upstream = {"a": set(), "b": set(), "c": set(), "d": {"a", "b"}, "e": {"d", "a", "b"}}
    plan(monkeypatch, upstream)
    client.slots = jobs
    ran = repro(tmp_path, jobs=jobs)
    assert sorted(ran) == sorted(upstream) and client.order[:3] == ["a", "b", "c"] and client.most == jobs
    assert all(ran.index(name) > ran.index(before) for name, needed in upstream.items() for before in needed)


def test_a_needed_stage_that_is_up_to_date_delays_nothing(monkeypatch, tmp_path, client):
    plan(monkeypatch, {"b": {"a"}})
    assert repro(tmp_path, jobs=2) == ["b"]


def test_after_a_failure_nothing_is_begun_and_what_runs_is_waited_for(monkeypatch, tmp_path, client):
    plan(monkeypatch, {"slow": set(), "fails": set(), "c": set(), "d": {"fails"}})
    with pytest.raises(Failure, match=r"^stage fails failed: it broke \(whole output: "):
        repro(tmp_path, jobs=2)
    assert client.order == ["slow", "fails"] and [task.code for task in client.tasks] == [0, 3]


@pytest.mark.parametrize("end", ["kill -9 $$", "echo 'ERROR: failed to run: x, exited with -9'; exit 1"], ids=["DVC", "its command"])
def test_a_killed_stage_runs_again_but_not_for_ever(monkeypatch, tmp_path, client, end):
    plan(monkeypatch, {"killed": set()})
    monkeypatch.setattr(module, "MOST_KILLS", 2)
    client.commands = {"killed": f"echo >> {tmp_path}/times; test $(wc -l < {tmp_path}/times) = 2 || {{ {end}; }}"}
    assert repro(tmp_path, jobs=1) == ["killed"] and client.order == ["killed"] * 2
    client.commands = {"killed": end}
    with pytest.raises(Failure, match="killed"):
        repro(tmp_path, jobs=1)
    assert len(client.order) == 2 + 3


def test_two_commands_do_not_run_one_study(monkeypatch, tmp_path, client):
    plan(monkeypatch, {"slow": set()})
    with module._alone(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"):
        repro(tmp_path, jobs=1)
    assert repro(tmp_path, jobs=1) == ["slow"]


# Words


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("Running stage 'a':\nadvml: first\nadvml: the loss is not finite\nERROR: failed to reproduce 'a'\n", "the loss is not finite"),
        ("Running stage 'a':\nERROR: failed to reproduce 'a': out of inodes\n\n", "failed to reproduce 'a': out of inodes"),
        ("", "no output"),
    ],
)
def test_the_reason_of_a_failure_is_advmls_last_word_or_dvcs(tmp_path, log, reason):
    (tmp_path / "log").write_text(log)
    assert module._reason(tmp_path / "log") == reason


@pytest.mark.parametrize("content", [None, "", '{"title": "x"', json.dumps({"title": "x", "done": 1})])
def test_half_a_progress_file_is_no_state(tmp_path, content):
    if content is not None:
        (tmp_path / "progress").write_text(content)
    assert module._read(tmp_path / "progress") == ({"title": "x", "done": 1} if content and content.endswith("}") else {})
