"""Processes that are killed, for real: what they had done is kept, and the end is the same to the bit."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from advml import tracking
from advml.core import result_cache
from advml.core.progress import Bar
from advml.data import adversarial
from advml.engine.fork_server import ADDRESS, forward
from advml.evaluation import records, run_attacks, samples
from advml.models import network
from advml.pipeline import training_stage
from advml.pipeline.stages import evaluate, finetune, pretrain
from advml.training import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
TIMEOUT = 120.0
PRETRAINING, MODEL = "CL-at-s0", "CL-Full-AT-s0"
EPOCHS = ("pretrain.CL.epochs=3", "regimes.Full-AT.epochs=3", "attack.steps=1")


def results(study, *names: str) -> dict[str, bytes]:
    """Every result file of these pretrainings and models, but for the seconds that they took."""
    roots = [
        folder for name in names for folder in (study.workspace.pretrained(name), study.workspace.model(name), study.workspace.report(name))
    ]
    found = {path.relative_to(study.root).as_posix(): path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()}
    found = {name: content for name, content in found.items() if not name.endswith("/seconds.json")}
    made = {"record": study.workspace.record("evaluate", names[-1]), "images": study.workspace.adversarial(names[-1])}
    return found | {name: path.read_bytes() for name, path in made.items() if path.exists()}


def states(study) -> set[tuple[str, int]]:
    """All states in scratch and results, with the times they were written: grows by one with every epoch and figure."""
    found = set()
    for path in (study.root / ".scratch").rglob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> bool:
    """Whether the condition came true while the process ran."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the process has hung"
        time.sleep(0.005)
    return False


def kill(process: subprocess.Popen, folder: Path) -> None:
    """SIGKILL to the command and to the fork that works for it."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.pid != process.pid and Path(child.cwd()) == folder:
                child.kill()
                child.wait(TIMEOUT)
    process.kill()
    process.communicate()


@contextlib.contextmanager
def killed_in_the_end(process: subprocess.Popen, folder: Path) -> Iterator[subprocess.Popen]:
    """However the test ends, an endless command does not outlive it."""
    try:
        yield process
    finally:
        kill(process, folder)


def fork_and_die(work: Callable[[], object]) -> None:
    """Run `work` in a forked process, which it must not survive: something in it sends SIGKILL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads; pytest-xdist has one, which waits
        child = os.fork()
    if child == 0:
        signal.alarm(int(TIMEOUT))
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"survived, or died otherwise: {status}"


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def die_when(condition: Callable[[], bool]) -> None:
    """At whatever moment it comes true."""
    while not condition():
        time.sleep(0.005)
    die()


def nth(number: int, action: Callable[..., object], otherwise: Callable[..., object]) -> Callable[..., object]:
    """A function that does `action` in its n-th call and `otherwise` in all before."""
    calls = []

    def call(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return action(*args, **kwargs) if len(calls) == number else otherwise(*args, **kwargs)

    return call


def after(function: Callable[..., object]) -> Callable[..., object]:
    """Do it, then die."""

    def call(*args: object, **kwargs: object) -> None:
        function(*args, **kwargs)
        die()

    return call


def leftovers(study) -> list[Path]:
    """Unfinished files among the results; those in scratch go with the next stage."""
    return [path for path in study.root.rglob("*") if path.suffix in (".part", ".old") and ".scratch" not in path.parts]


def progressed(study, steps: int) -> Callable[[], bool]:
    """A condition: this many states have been written from now on."""
    seen = states(study)
    wanted = len(seen) + steps

    def condition() -> bool:
        seen.update(states(study))
        return len(seen) >= wanted

    return condition


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, empty_store):
    """The picture of the curves in MLflow takes as long as the training, and no kill has to do with it."""
    monkeypatch.setattr("mlflow.MlflowClient.log_figure", lambda *_: None)


@pytest.fixture(scope="module")
def uninterrupted(new_study, tmp_path_factory):
    """A study whose stages ran from start to end."""
    study = new_study(tmp_path_factory.mktemp("interruption") / "uninterrupted", *EPOCHS)
    pretrain.run(study.context(), scheme="CL", phase="at", seed=0)
    finetune.run(study.context(), scheme="CL", regime="Full-AT", seed=0)
    evaluate.run(study.context(), scheme="CL", regime="Full-AT", seed=0)
    return study


@pytest.fixture
def begun(make_study, uninterrupted):
    """A study of the same parameters in which nothing has run yet."""
    return make_study("begun", *EPOCHS)


@pytest.fixture
def pretrained(uninterrupted, begun):
    """A study of the same parameters with its pretraining done."""
    shutil.copytree(uninterrupted.workspace.pretrained(PRETRAINING), begun.workspace.pretrained(PRETRAINING))
    return begun


@pytest.fixture
def finetuned(uninterrupted, pretrained):
    """A study of the same parameters with its model done."""
    shutil.copytree(uninterrupted.workspace.model(MODEL), pretrained.workspace.model(MODEL))
    return pretrained


@pytest.fixture(scope="module")
def killed_once(new_study, tmp_path_factory):
    """A study whose pretraining was killed in its third epoch, which no test changes."""
    study = new_study(tmp_path_factory.mktemp("interruption") / "killed", *EPOCHS)
    with pytest.MonkeyPatch.context() as patch:
        killed_pretraining(study, patch)
    return study


@pytest.fixture
def killed(killed_once, tmp_path):
    """A study of one's own whose pretraining was killed in its third epoch."""
    return killed_once.copy(tmp_path / "killed")


@pytest.fixture(scope="module")
def late(new_study, uninterrupted, tmp_path_factory):
    """A study whose fine-tuning was killed after two of three epochs, which no test changes."""
    study = new_study(tmp_path_factory.mktemp("interruption") / "late", *EPOCHS)
    shutil.copytree(uninterrupted.workspace.pretrained(PRETRAINING), study.workspace.pretrained(PRETRAINING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", nth(2, after(checkpoint.Checkpoint.save), checkpoint.Checkpoint.save))
        fork_and_die(lambda: finetune.run(study.context(), scheme="CL", regime="Full-AT", seed=0))
    return study


# At any moment


def test_a_study_killed_at_random_moments_ends_with_the_same_bits(begun, uninterrupted, advml):
    moments = random.Random(0)
    for _ in range(4):
        condition = progressed(begun, moments.randint(1, 3))
        process = advml.start("train", "CL", "Full-AT", cwd=begun.root)
        assert wait_for(condition, process), process.communicate()
        time.sleep(moments.uniform(0, 0.15))
        kill(process, begun.root)
    done = advml("train", "CL", "Full-AT", cwd=begun.root)
    assert done.returncode == 0, done.stderr
    assert results(begun, PRETRAINING, MODEL) == results(uninterrupted, PRETRAINING, MODEL)
    assert not leftovers(begun)
    assert advml("sync", cwd=begun.root).returncode == 0  # ends runs of which nothing but their start is known
    assert [run for run in begun.runs() if run[1] != "KILLED"] == [(PRETRAINING, "FINISHED"), (MODEL, "FINISHED")]


def test_a_command_started_and_killed_without_any_help_goes_on(begun, uninterrupted, advml):
    """`python -m advml` without the server of `advml repro`, here in a process that has imported what it needs."""
    two_more = progressed(begun, 2)

    def command() -> None:
        os.chdir(begun.root)
        sys.argv = ["advml", "pretrain", "CL", "at"]
        threading.Thread(target=die_when, args=(two_more,), daemon=True).start()
        runpy.run_module("advml", run_name="__main__")

    fork_and_die(command)
    assert begun.runs() == [(PRETRAINING, "RUNNING")]
    assert advml("pretrain", "CL", "at", cwd=begun.root).returncode == 0
    assert results(begun, PRETRAINING) == results(uninterrupted, PRETRAINING)
    assert begun.runs() == [(PRETRAINING, "FINISHED")]


# At the moments that matter


def half_a_file(tensors: object, path: Path, metadata: object) -> None:
    Path(path).write_bytes(b"half a file")
    die()


MOMENTS = {  # of the last of three epochs, and after
    "in the middle of an epoch": lambda patch: patch.setattr(Bar, "reach", nth(2, die, lambda *_: None)),
    "while a state is written": lambda patch: patch.setattr(checkpoint, "save_file", half_a_file),
    "when the last state is in place": lambda patch: patch.setattr(checkpoint.Checkpoint, "save", after(checkpoint.Checkpoint.save)),
    "when the model is written but not in its place": lambda patch: patch.setattr(network, "save", after(network.save)),
    "between model and history": lambda patch: patch.setattr(training_stage, "write_atomically", die),
    "between history and MLflow": lambda patch: patch.setattr(tracking.Run, "log_checkpoint", die),
    "before the run is ended": lambda patch: patch.setattr(tracking.Run, "finish", die),
    "when all is done but the note of it": lambda patch: patch.setattr(tracking.Run, "finish", after(tracking.Run.finish)),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_phase_killed_at_this_moment_ends_as_if_nothing_had_happened(late, tmp_path, uninterrupted, monkeypatch, moment):
    study = late.copy(tmp_path / "study")

    def work() -> None:
        finetune.run(study.context(), scheme="CL", regime="Full-AT", seed=0, reuse=True)

    with monkeypatch.context() as patch:
        moment(patch)
        fork_and_die(work)
    work()
    assert results(study, PRETRAINING, MODEL).keys() == results(uninterrupted, PRETRAINING, MODEL).keys() - LATER
    assert results(study, PRETRAINING, MODEL).items() <= results(uninterrupted, PRETRAINING, MODEL).items()
    assert not leftovers(study)
    assert study.runs() == [(MODEL, "FINISHED")]


# Of stages that did not run here.
LATER = {
    "record",
    "images",
    *(f"reports/{name}" for name in (f"{MODEL}/metrics.json", f"{MODEL}/samples.parquet", f"{PRETRAINING}/history.json")),
}


def evaluated(study) -> dict[str, bytes]:
    """Everything that an evaluation writes."""
    space = study.workspace
    files = (space.record("evaluate", MODEL), space.samples(MODEL), space.adversarial(MODEL), space.report(MODEL) / "metrics.json")
    return {path.name: path.read_bytes() for path in files if path.exists()}


def evaluation(study, *overrides: str) -> Callable[[], object]:
    return lambda: evaluate.run(study.context(*overrides), scheme="CL", regime="Full-AT", seed=0, reuse=True)


SMALL_BATCHES = ("evaluate.batch_size=5", "worst_case.restarts=2")
# What the end of a process may fall upon.
ENDS: dict[str, Callable[[pytest.MonkeyPatch, int], None]] = {
    "in an attack": lambda patch, number: patch.setattr(run_attacks, "counted", nth(number, die, run_attacks.counted)),
    "after a prediction": lambda patch, number: patch.setattr(
        run_attacks.Scorer, "predict", nth(number, after(run_attacks.Scorer.predict), run_attacks.Scorer.predict)
    ),
    "before a part is written": lambda patch, number: patch.setattr(
        result_cache, "write_atomically", nth(number, die, result_cache.write_atomically)
    ),
    "after a part is written": lambda patch, number: patch.setattr(
        result_cache, "write_atomically", nth(number, after(result_cache.write_atomically), result_cache.write_atomically)
    ),
}


def test_an_evaluation_killed_again_and_again_ends_as_if_nothing_had_been(finetuned, tmp_path, monkeypatch):
    calm = finetuned.copy(tmp_path / "calm")
    evaluation(calm, *SMALL_BATCHES)()
    ends, work = list(itertools.product(ENDS.values(), (1, 2))), evaluation(finetuned, *SMALL_BATCHES)
    random.Random(0).shuffle(ends)
    for moment, number in ends:
        with monkeypatch.context() as patch:
            moment(patch, number)
            fork_and_die(work)
    assert not evaluated(finetuned)
    work()
    assert evaluated(finetuned) == evaluated(calm)


LAST_WRITES = {"the images": adversarial, "the samples": samples, "the record": records}


def test_a_finished_part_is_not_measured_again(finetuned, uninterrupted, monkeypatch):
    """Killed before the first of the results is written, there is nothing left to attack; nor after the next, and the last."""
    for module in LAST_WRITES.values():
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_atomically", die)
            fork_and_die(evaluation(finetuned))
        monkeypatch.setattr(run_attacks._Batch, "measure", None)
    evaluation(finetuned)()
    assert results(finetuned, MODEL).items() <= results(uninterrupted, PRETRAINING, MODEL).items()
    assert len(evaluated(finetuned)) == 4


# What is not gone on with


def killed_pretraining(study, monkeypatch, *overrides: str) -> None:
    """Kill a pretraining in its third epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "reach", nth(8, die, lambda *_: None))
        fork_and_die(lambda: pretrain.run(study.context(*overrides), scheme="CL", phase="at", seed=0))
    assert study.runs() == [(PRETRAINING, "RUNNING")]


def test_a_changed_parameter_starts_afresh_and_ends_the_orphaned_run(begun, uninterrupted, monkeypatch):
    killed_pretraining(begun, monkeypatch, "pretrain.CL.learning_rate=0.1")
    pretrain.run(begun.context(), scheme="CL", phase="at", seed=0)
    assert results(begun, PRETRAINING) == results(uninterrupted, PRETRAINING)
    assert begun.runs() == [(PRETRAINING, "KILLED"), (PRETRAINING, "FINISHED")]


def first_step(study, monkeypatch) -> int:
    """Which step a pretraining that is interrupted right after it begins with."""
    steps = []

    def stop(bar: Bar, done: int, note: object = None) -> None:
        steps.append(done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bar, "reach", stop)
        pretrain.run(study.context(), scheme="CL", phase="at", seed=0)
    return steps[0]


def test_the_same_sources_go_on_in_the_third_epoch_and_another_version_starts_afresh(killed, monkeypatch, tmp_path):
    assert first_step(killed.copy(tmp_path / "same"), monkeypatch) == 9
    monkeypatch.setattr("advml.pipeline.context.source_digest", lambda stage="": "other sources")
    assert first_step(killed, monkeypatch) == 1
    assert killed.runs() == [(PRETRAINING, "KILLED")]  # a copy of a study has runs of its own


# Polite ends


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_waits_until_a_write_to_the_store_is_over(begun, monkeypatch, number, error):
    """An exception in the middle of a transaction would leave the database locked."""
    from mlflow import MlflowClient

    written, log_batch = [], MlflowClient.log_batch

    def interrupted(client: MlflowClient, *args: object, **kwargs: object) -> None:
        if kwargs.get("metrics"):
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # whatever obeys at once has done so now
            written.append(kwargs["metrics"])
        log_batch(client, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", interrupted)
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            pretrain.run(begun.context(), scheme="CL", phase="at", seed=0)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert len(written) == 1 and begun.runs() == [(PRETRAINING, "KILLED")]


def test_a_run_whose_process_died_before_anyone_noted_it_is_ended_by_sync(begun, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "note", nth(2, die, checkpoint.Checkpoint.note))
        fork_and_die(lambda: pretrain.run(begun.context(), scheme="CL", phase="at", seed=0))
    pretrain.run(begun.context(), scheme="CL", phase="at", seed=0)
    assert begun.runs() == [(PRETRAINING, "RUNNING"), (PRETRAINING, "FINISHED")]
    tracking.sync(begun.place())
    assert begun.runs() == [(PRETRAINING, "KILLED"), (PRETRAINING, "FINISHED")]


INTERRUPTED = "advml: interrupted; the same command goes on from what was finished\n"
ENDLESS = (*EPOCHS, "pretrain.CL.epochs=100000")  # on a busy machine a signal may come late, but the command is still at work


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGTERM, 143, ""), (signal.SIGINT, 130, INTERRUPTED), (signal.SIGHUP, 129, "")]
)
def test_a_signal_ends_the_run_as_killed_and_the_command_goes_on_later(make_study, advml, monkeypatch, number, code, words):
    study, reference = make_study("study", *ENDLESS), make_study("reference", *ENDLESS)
    reached = []
    for epochs in (3, 1) if number == signal.SIGTERM else (3,):  # the second time: one more; starting afresh would not get there
        with killed_in_the_end(advml.start("pretrain", "CL", "at", cwd=study.root), study.root) as process:
            assert wait_for(progressed(study, epochs), process), process.communicate()
            for _ in range(2):  # as from Docker and from DVC
                process.send_signal(number)
            _, stderr = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code and stderr.endswith(words) and "Traceback" not in stderr
        assert study.runs() == [(PRETRAINING, "KILLED")]
        reached.append(epoch_of(study))
    assert reached == sorted(set(reached))

    save = checkpoint.Checkpoint.save

    def stop(*args: object) -> None:
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", nth(reached[-1], stop, save))
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(reference.context(), scheme="CL", phase="at", seed=0)
    assert state_of(study) == state_of(reference)


def test_an_interrupted_training_says_where_the_same_command_continues(begun, monkeypatch, capsys):
    save = checkpoint.Checkpoint.save

    def said(stopping: Callable[..., object] | None) -> list[str]:
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            if stopping:
                patch.setattr(checkpoint.Checkpoint, "save", stopping)
            pretrain.run(begun.context(), scheme="CL", phase="at", seed=0)
        return [line.partition("; ")[2] or line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]

    assert said(interrupt) == ["the same command starts again: no epoch has finished"]
    assert said(nth(2, interrupt, save)) == ["the same command continues after epoch 1 of 3"]
    assert said(None) == [f"note: pretrain {PRETRAINING}: resuming after epoch 1 of 3"]


def test_a_command_in_the_background_leaves_ctrl_c_to_others(make_study, advml):
    """A shell without job control starts `command &` with SIGINT ignored; a Ctrl-C in its terminal is not for the command."""
    study = make_study("study", *ENDLESS)
    with killed_in_the_end(advml.start("pretrain", "CL", "at", cwd=study.root, background=True), study.root) as process:
        assert wait_for(progressed(study, 1), process), process.communicate()
        process.send_signal(signal.SIGINT)
        assert wait_for(progressed(study, 5), process), process.communicate()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 143 and study.runs() == [(PRETRAINING, "KILLED")]


def test_clients_that_die_while_they_wait_take_no_other_stage_with_them(warm):
    """As when stages are killed while the server still imports what they need."""
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(warm[ADDRESS])
    assert forward(warm[ADDRESS], ["--version"]) == 0


def endless_repro(study) -> subprocess.Popen[str]:
    """`advml repro` of a pipeline with one stage that never ends, in a session of its own."""
    (study.root / ".dvc").mkdir()
    (study.root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (study.root / "dvc.yaml").write_text("stages: {endless: {cmd: python -m advml pretrain CL at, outs: [models/pretrain/CL-at-s0]}}\n")
    return subprocess.Popen(
        [sys.executable, "-m", "advml", "repro"],
        cwd=study.root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a runner in the background ignores it
    )


@pytest.mark.parametrize("outright", [False, True], ids=["Ctrl-C", "SIGKILL"])
def test_a_repro_that_ends_early_leaves_no_stage_at_work(make_study, outright):
    """DVC, the stage and its fork end too: else two processes could write one state, and the next `dvc repro` finds its outputs busy."""
    study = make_study("study", *ENDLESS)
    process = endless_repro(study)
    with killed_in_the_end(process, study.root):
        assert wait_for(progressed(study, 1), process), process.communicate()
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill() if outright else os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=TIMEOUT)
        assert len(family) >= 4 and psutil.wait_procs(family, timeout=TIMEOUT if outright else 5)[1] == []
    assert outright or (process.returncode == 130 and stderr == INTERRUPTED)
    assert study.runs() == [(PRETRAINING, "KILLED")]


def state_file(study) -> Path:
    return study.workspace.scratch(f"pretrain-{PRETRAINING}") / "state.safetensors"


def state_of(study) -> tuple[bytes, dict[str, Any]]:
    """The tensors of an unfinished training, and what is noted of it but for the seconds that it took."""
    size = int.from_bytes(state_file(study).read_bytes()[:8], "little")
    with safe_open(state_file(study), "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    return state_file(study).read_bytes()[8 + size :], progress | {"seconds": None}


def epoch_of(study) -> int:
    """The last finished epoch."""
    folder = state_file(study).parent
    return checkpoint.Checkpoint(folder, json.loads((folder / "notes.json").read_text())["fingerprint"]).load().epoch
