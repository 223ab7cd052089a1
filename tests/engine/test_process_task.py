"""Calls in processes of workers: what they answer, what a kill costs, and that nothing outlives its driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from advml.config import Cluster
from advml.core.errors import Failure, UserError
from advml.core.paths import checked_name
from advml.engine import process_task
from advml.engine.cluster import connect
from advml.engine.devices import VISIBLE
from advml.engine.process_task import Call, Lost, Pool, ask, call_here

HOLD = """
import sys, time
from pathlib import Path
from advml.config import Cluster
from advml.engine.cluster import connect
from advml.engine.process_task import Call, Pool
with connect(sys.argv[1] if len(sys.argv) > 1 else None, root=Path(), jobs=1, options=Cluster()) as slots:
    pool = Pool(slots, Path(), {}, False)
    call = Call(pool, __import__("os").getpid)
    while not call.is_ready({}):
        time.sleep(0.01)
    print(call.take(), flush=True)
    Call(pool, time.sleep, 300)
    time.sleep(300)
"""


@contextlib.contextmanager
def pool(root: Path, *, where: str | None = None, slots: int = 1, reserve: bool = False) -> Iterator[Pool]:
    with connect(where, root=root, jobs=slots, options=Cluster()) as found:
        made = Pool(found, root, {}, reserve)
        try:
            yield made
        finally:
            made.close()


def taken(call: Call) -> object:
    wait_for(lambda: call.is_ready(call._pool.slots.client.nthreads()))
    return call.take()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_function_sends_messages_and_goes_on_with_the_answers_and_its_process_is_used_again(tmp_path):
    with pool(tmp_path) as here:
        first, call = taken(Call(here, os.getpid)), Call(here, ask, "how is it?")
        assert taken(call) == "how is it?" and not call.is_finished
        call.answer(True)
        assert taken(call) is True and call.is_finished
        assert taken(Call(here, os.getpid)) == first != os.getpid()
        with pytest.raises(Failure, match=r"^FileNotFoundError: .*/nowhere"):
            taken(Call(here, os.listdir, "/nowhere"))
        with pytest.raises(UserError, match="--name"):
            taken(Call(here, checked_name, "../.."))
        assert taken(Call(here, os.getpid)) == first
        call = Call(here, ask, "how is it?")
        taken(call)
        os.kill(first, signal.SIGKILL)
        call.answer(True)
        with pytest.raises(Lost):
            taken(call)
        idle = taken(Call(here, os.getpid))
        os.kill(idle, signal.SIGKILL)  # as one that has waited for too long
        wait_for(lambda: not next(iter(process_task._processes)).is_alive())
        second = taken(Call(here, os.getpid))
        call = Call(here, time.sleep, 300)
        time.sleep(0.2)
        call.cancel()
        wait_for(lambda: not psutil.pid_exists(second))
        last = taken(Call(here, os.getpid))
    assert len({first, idle, second, last}) == 4 and not psutil.pid_exists(last)
    assert not list(tmp_path.rglob("token-*"))


def test_calls_at_a_time_share_the_cores_and_each_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv(VISIBLE, "0,1,2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("dask.system.CPU_COUNT", 7)
    with pool(tmp_path, slots=2, reserve=True) as here:
        calls = [Call(here, ask, name) for name in ("a", "b")]
        assert [taken(call) for call in calls] == ["a", "b"]
        environments = [psutil.Process(one._process.pid).environ() for one in process_task._processes]
    assert sorted(one[VISIBLE] for one in environments) == ["0", "1"] and {one["OMP_NUM_THREADS"] for one in environments} == {"3"}


def test_a_call_here_needs_no_slot(tmp_path):
    assert call_here({}, os.path.join, "a", "b") == "a/b"


def test_a_lost_worker_costs_the_call_that_waits_for_an_answer(tmp_path, scheduler, start):
    start("worker", scheduler, "--nthreads", "1")
    with pool(tmp_path, where=scheduler) as there:
        call = Call(there, ask, "how is it?")
        assert taken(call) == "how is it?"
        worker = psutil.Process(taken(Call(there, os.getppid)))
        worker.kill()  # its nanny starts another one
        wait_for(lambda: call._worker not in there.slots.client.nthreads())
        call.answer(True)
        with pytest.raises(Lost):
            taken(call)
        assert taken(Call(there, os.getppid)) != worker.pid


@pytest.mark.parametrize("remote", [False, True])
def test_a_killed_driver_leaves_nothing_at_work(tmp_path, request, remote):
    where = [request.getfixturevalue("scheduler")] if remote else []
    if remote:
        request.getfixturevalue("start")("worker", *where, "--nthreads", "1")
    driver = subprocess.Popen([sys.executable, "-c", HOLD, *where], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    process = psutil.Process(int(driver.stdout.readline()))
    time.sleep(0.5)
    driver.kill()
    driver.communicate()
    assert psutil.wait_procs([process], timeout=30)[1] == []


def test_a_driver_that_ends_leaves_the_processes_of_another_alone(tmp_path, scheduler, start):
    start("worker", scheduler, "--nthreads", "2")
    with pool(tmp_path, where=scheduler) as one:
        call = Call(one, ask, "how is it?")
        taken(call)
        with pool(tmp_path, where=scheduler) as other:
            taken(Call(other, os.getpid))
        call.answer(True)
        assert taken(call) is True
