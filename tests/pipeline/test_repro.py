"""`advml repro`: which stages run, how many at a time, and what is said when one fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from advml.config.presets import preset
from advml.core.errors import Failure, UserError
from advml.core.exclusive import exclusive
from advml.engine import stage_task
from advml.pipeline import repro as module
from advml.pipeline.repro import repro

# A stage waits until the other one has begun: they end only if they overlap.
MEET = "touch {0}.begun; for i in $(seq 300); do test -e {1}.begun && echo {0} > {0} && exit 0; sleep 0.1; done; exit 1"
# A failure stops what has not begun, so the stage that fails waits for the one that must run beside it.
AWAIT = "for i in $(seq 300); do test -e {0}.begun && break; sleep 0.1; done"
REPORTING = """
import os, sys, time
with open(os.environ["ADVML_BOARD"], "w") as file:
    file.write("nearly")
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

    reports: set[tuple[str, str]]
    ended: list[tuple[str, bool]]

    def __init__(self, *, total: int, folder: Path) -> None:
        super().__init__(total=total, folder=folder)
        Seen.reports, Seen.ended, Seen.planned = set(), [], total

    def show(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.reports.add((name, (self.folder / f"{name}.progress").read_text()))

    def finish(self, name: str, *, ok: bool) -> None:
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
    assert (
        str(failed.value)
        == f"stage bad failed: boom; mend it (whole output: {log}); fix the cause and repeat the command, which goes on from here"
    )
    assert "boom" in log.read_text()
    assert "note: odd images" in capsys.readouterr().err.splitlines()
    # What ran beside it was finished and is kept; what needs it was not begun.
    assert Seen.planned == 5 and sorted(Seen.ended) == [("after", True), ("bad", False), ("left", True), ("right", True)]
    assert set(YAML(typ="safe").load(tmp_path / "dvc.lock")["stages"]) == {"left", "right", "after"}
    # Progress came through the file, which is not left behind.
    assert ("after", "nearly") in Seen.reports
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
from advml import cli
from advml.pipeline import repro
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


def test_a_lock_that_a_killed_dvc_has_left_damaged_is_said_with_the_remedy(tmp_path):
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (tmp_path / "dvc.yaml").write_text("stages: {one: {cmd: touch one, outs: [one]}}\n")
    (tmp_path / ".dvc" / "tmp" / "rwlock").write_text('{"half')
    with pytest.raises(UserError, match=r"rwlock.*remove it"):
        repro(tmp_path, jobs=1)


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
    planned = {name: sorted(needs) for name, needs in module._ask(tmp_path, "plan").items()}
    assert planned == {"alone": [], "first": [], "join": ["first", "make@0", "make@1"], "make@0": ["first"], "make@1": ["first"]}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=tmp_path, check=True)
    assert module._ask(tmp_path, "plan") == {}
    (tmp_path / "made-1").write_text("2")
    # What turns out to be as it was has not run: once made again, `made-1` is what `join` has seen.
    assert list(module._ask(tmp_path, "plan")) == ["join", "make@1"]
    os.link(tmp_path / "dvc.lock", tmp_path / "before")
    assert "join" not in repro(tmp_path, jobs=1)
    # DVC, if it is killed while it writes, leaves the old file: what it writes is another one, which takes its place.
    assert not (tmp_path / "before").samefile(tmp_path / "dvc.lock") and not list(tmp_path.glob("*.part"))


def test_other_pipelines_that_need_this_one_are_not_run_with_it(tmp_path):
    pipeline(tmp_path, {"first": {"cmd": "echo 1 > first", "outs": ["first"]}})
    (other := tmp_path / "pipelines" / "other").mkdir(parents=True)
    (other / "dvc.yaml").write_text("stages: {behind: {cmd: cp ../../first behind, deps: [../../first], outs: [behind]}}")
    assert module._ask(tmp_path, "plan") == {"first": []}
    assert repro(tmp_path, jobs=1) == ["first"] and not (other / "behind").exists()


# The order, with commands in place of DVC


class Shell:
    """Runs stages as short shell commands; remembers their order and how many ran at once."""

    def __init__(self) -> None:
        self.commands = {
            "fails": "echo 'ERROR: it broke'; exit 3",
            "slow": "sleep 0.6; echo 'note: odd images'; echo 'warning: no tracking'",
        }
        self.order, self.running, self.most, self.ended = [], set(), 0, []

    def run(self, name: str, *, log: Path, **_: object) -> int:
        self.order.append(name)
        self.running.add(name)
        self.most = max(self.most, len(self.running))
        with log.open("wb") as output:
            command = f"echo \"Running stage '{name}':\"; {self.commands.get(name, 'sleep 0.15')}"
            code = subprocess.run(["sh", "-c", command], stdout=output, check=False).returncode
        self.running.remove(name)
        self.ended.append((name, code))
        return code


@pytest.fixture
def shell(monkeypatch) -> Shell:
    """In place of DVC."""
    shell = Shell()
    monkeypatch.setattr(stage_task, "_run_dvc", shell.run)
    monkeypatch.setattr(stage_task, "PAUSE", 0)
    return shell


def plan(monkeypatch, upstream: dict[str, list[str]]) -> None:
    monkeypatch.setattr(module, "_ask", lambda root, what: upstream)


@pytest.mark.parametrize("jobs", [1, 3])
def test_never_more_stages_than_slots_and_never_one_before_what_it_needs(monkeypatch, tmp_path, shell, jobs):
    upstream = {"a": [], "b": [], "c": [], "d": ["a", "b"], "e": ["d", "a", "b"]}
    plan(monkeypatch, upstream)
    ran = repro(tmp_path, jobs=jobs)
    assert sorted(ran) == sorted(upstream) and sorted(shell.order[:3]) == ["a", "b", "c"] and shell.most == jobs
    ended = [name for name, _ in shell.ended]
    assert all(ended.index(name) > ended.index(before) for name, needed in upstream.items() for before in needed)


def test_a_needed_stage_that_is_up_to_date_delays_nothing(monkeypatch, tmp_path, shell):
    plan(monkeypatch, {"b": ["a"]})
    assert repro(tmp_path, jobs=2) == ["b"]


def test_after_a_failure_nothing_is_begun_and_what_runs_is_waited_for(monkeypatch, tmp_path, shell, capsys):
    plan(monkeypatch, {"slow": [], "fails": [], "c": [], "d": ["fails"]})
    with pytest.raises(Failure, match=r"^stage fails failed: it broke"):
        repro(tmp_path, jobs=2)
    assert sorted(shell.ended) == [("fails", 3), ("slow", 0)]
    assert {"note: odd images", "warning: no tracking"} <= set(capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    ("end", "most", "reason"),
    [
        ("kill -9 $$", 3, "killed"),
        ("echo 'ERROR: failed to run: x, exited with -9'; exit 1", 3, "exited with -9"),
        ("echo \"ERROR: 'x' is busy, remove '.dvc/tmp/rwlock' and try again.\"; exit 1", 11, "busy"),
    ],
    ids=["DVC", "its command", "still locked"],
)
def test_a_killed_stage_runs_again_but_not_for_ever(monkeypatch, tmp_path, shell, end, most, reason):
    plan(monkeypatch, {"killed": []})
    shell.commands = {"killed": f"echo >> {tmp_path}/times; test $(wc -l < {tmp_path}/times) = 2 || {{ {end}; }}"}
    assert repro(tmp_path, jobs=1) == ["killed"] and shell.order == ["killed"] * 2
    shell.commands = {"killed": end}
    with pytest.raises(Failure, match=reason):
        repro(tmp_path, jobs=1)
    assert len(shell.order) == 2 + most


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("advml: first\nadvml: the loss is not finite\nERROR: failed to reproduce a\n", "the loss is not finite"),
        ("ERROR: failed to reproduce a: out of inodes\n\n", "failed to reproduce a: out of inodes"),
    ],
)
def test_the_reason_of_a_failure_is_advmls_last_word_or_dvcs(monkeypatch, tmp_path, shell, output, reason):
    plan(monkeypatch, {"a": []})
    shell.commands = {"a": f"printf '{output}'; exit 1"}
    with pytest.raises(Failure, match=f"^stage a failed: {reason} "):
        repro(tmp_path, jobs=1)


def test_a_folder_that_a_stage_cannot_write_to_is_one_line(monkeypatch, tmp_path, shell):
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    plan(monkeypatch, {"a": []})
    monkeypatch.setattr(stage_task, "_run_dvc", full)
    with pytest.raises(Failure, match=r"^stage a .*No space left on device"):
        repro(tmp_path, jobs=1)


def test_two_commands_do_not_run_one_study(monkeypatch, tmp_path, shell):
    plan(monkeypatch, {"slow": []})
    with exclusive(tmp_path / stage_task.FOLDER / "repro", work="it runs"), pytest.raises(UserError, match=f"process {os.getpid()}"):
        repro(tmp_path, jobs=1)
    assert repro(tmp_path, jobs=1) == ["slow"]
