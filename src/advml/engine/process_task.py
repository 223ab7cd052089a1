"""Run functions in processes on a Dask worker's machine, which exchange messages with the driver.

    >>> call = Call(pool, run_trial, search, values)       # driver: a free slot's process calls run_trial(search, values)
    >>> answer = ask(report)                               # that function sends a message, and waits for the answer
    >>> call.take()                                        # driver: the message, or what the function returned
    >>> call.answer(False)                                 # driver: the function goes on

Every exchange is one Dask task. Processes are reused for the next call, because imports and data cost seconds. If a process is killed,
only its call fails: `Call.take` raises `Lost`. No process outlives the driver: a running call ends when Dask withdraws its task, a
waiting process gives up after `PATIENCE`; on the driver's own machine both end at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advml.core.errors import Failure, UserError
from advml.core.messages import one_line
from advml.core.processes import PARENT
from advml.engine.devices import one_device
from advml.engine.stage_task import is_cancelled, require_shared

if TYPE_CHECKING:
    from distributed import Future

    from advml.engine.cluster import Slots

COMMAND = ("tune", "worker")  # the command of advml that calls `serve`
PATIENCE = 120.0  # seconds that a process waits for the driver
GONE = (EOFError, OSError)  # errors of a connection whose other end is closed


class Lost(Failure):
    """The process was killed, or its worker is gone."""

    def __init__(self, text: str = "a process was killed (out of memory?); repeat the command, which goes on from here") -> None:
        super().__init__(text)


# In the process

_driver: Connection | None = None


def serve() -> None:
    """Call the functions that arrive on standard input (a socket), and send back their results, until it is closed."""
    global _driver
    _driver = Connection(os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    with contextlib.suppress(*GONE):
        while _driver.poll(PATIENCE):
            _driver.send(_called(_driver.recv_bytes()))


def _called(message: bytes) -> tuple[str, Any]:
    try:
        function, arguments = ForkingPickler.loads(message)
        return "value", function(*arguments)
    except (UserError, Failure) as error:
        return "error", type(error)(str(error))
    except Exception as error:
        return "error", Failure(described(error))


def ask(message: Any) -> Any:
    """Send a message to the driver and return its answer; if the driver is gone, the process ends."""
    try:
        _driver.send(("message", message))
        if _driver.poll(PATIENCE):
            return _driver.recv()
    except GONE:
        pass
    os._exit(1)


def described(error: BaseException) -> str:
    """Description of an error in one line; for an internal error, with file and line."""
    text = one_line(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return "out of memory"
    if isinstance(error, (UserError, Failure)):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}, line {place.lineno})"


# On the worker


class Process:
    """A process that runs `serve`.

    Attributes:
        token: of the driver that it works for, since other drivers may have other sources.
        call: key of its current call; None: it is free.
    """

    def __init__(self, environment: Mapping[str, str], *, reserve: bool = False, token: str = "", call: str | None = None) -> None:
        self.token, self.call = token, call
        self._resources = contextlib.ExitStack()
        device = self._resources.enter_context(one_device()) if reserve else {}
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "advml", *COMMAND],
                stdin=theirs,
                stdout=2,
                start_new_session=True,  # only the driver handles Ctrl-C
                env={**os.environ, PARENT: str(os.getpid()), **device, **environment},
            )
        self._connection = Connection(ours.detach())

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def exchange(self, message: Any, *, until: Callable[[], bool] = lambda: False) -> tuple[str, Any]:
        """Send a message; returns kind and value of the reply, or raises it if it is an error.

        Raises:
            Lost: the process is killed, or `until()` becomes true first.
        """
        try:
            self._connection.send(message)
            while not self._connection.poll(0.1):
                if until():
                    raise Lost
            kind, value = self._connection.recv()
        except GONE:
            raise Lost from None
        if kind == "error":
            raise value
        return kind, value

    def end(self) -> None:
        """Kill the process, and wait until it has ended."""
        self._process.kill()
        with contextlib.suppress(*GONE):
            while self._connection.poll(5):  # wait for the end of the forked process
                self._connection.recv_bytes()
        self._process.wait()
        self._connection.close()
        self._resources.close()


def call_here(environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)` in a new process of this machine, outside of the slots, and end the process."""
    process = Process(environment)
    try:
        return process.exchange((function, arguments))[1]
    finally:
        process.end()


_processes: set[Process] = set()  # processes of this worker
_choosing = threading.Lock()  # needed because a worker's slots are threads


def advance(key: str, message: Any, *, root: str, token: str, environment: Mapping[str, str], reserve: bool) -> tuple[str, str, Any] | None:
    """Dask task: send a message to the process of the call `key` (the first one to a free process).

    Returns:
        The worker's address, and kind and value of the reply; None if the process was killed.
    """
    from dask.system import CPU_COUNT
    from distributed.worker import get_worker

    begins = not isinstance(message, bool)
    if begins:
        require_shared(root, token)
    process = _chosen(key, token, or_free=begins)
    if process is None and not begins:
        return None
    if process is None:
        slots = get_worker().state.nthreads
        share = {"OMP_NUM_THREADS": str(max(1, CPU_COUNT // slots))} if slots > 1 else {}
        process = Process({**share, **environment}, reserve=reserve, token=token, call=key)
        _processes.add(process)
    kind = "error"
    try:
        kind, value = process.exchange(message, until=is_cancelled)
    except Lost:
        _discard(process)
        return None
    finally:
        if kind != "message":  # the call has ended; after a message it waits for an answer
            process.call = None
    return get_worker().address, kind, value


def _chosen(key: str, token: str, *, or_free: bool) -> Process | None:
    """Process that works on the call `key`, or else a free one; processes that have ended are forgotten."""
    with _choosing:
        for process in list(_processes):
            if not process.is_alive():
                _discard(process)
        known = list(_processes)
        free = (one for one in known if or_free and one.call is None and one.token == token)
        process = next((one for one in known if one.call == key), None) or next(free, None)
        if process:
            process.call = key
        return process


def _discard(process: Process) -> None:
    _processes.discard(process)
    process.end()


def end_processes(token: str) -> None:
    """End the processes of this worker that work for a driver."""
    for process in list(_processes):
        if process.token == token:
            _discard(process)


# In the driver


@dataclass
class Pool:
    """Slots of a cluster, with the settings of processes started there.

    Attributes:
        environment: variables added to those of the worker.
        reserve: whether every process gets a GPU of its own, if there are any.
        news: event that is set when a call has a message or a result.
    """

    slots: Slots
    root: Path
    environment: Mapping[str, str]
    reserve: bool
    news: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """End all processes."""
        self.slots.client.run(end_processes, self.slots.token, on_error="ignore")


class Call:
    """A call of `function(*arguments)` in a process of the pool."""

    _count = itertools.count()

    def __init__(self, pool: Pool, function: Callable[..., Any], *arguments: Any) -> None:
        self._pool, self._key = pool, f"{pool.slots.token}-{next(Call._count)}"
        self._worker: str | None = None
        self.is_finished = False
        self._send((function, arguments))

    def answer(self, answer: bool) -> None:
        """Answer the message that `take` has returned."""
        self._send(answer)

    def _send(self, message: Any) -> None:
        slots = self._pool.slots
        self._future: Future = slots.client.submit(
            advance,
            self._key,
            message,
            root=str(self._pool.root.resolve()),
            token=slots.token,
            environment=self._pool.environment,
            reserve=self._pool.reserve,
            key=f"{self._key}-{next(Call._count)}",
            workers=[self._worker] if self._worker else None,
            pure=False,
        )
        self._future.add_done_callback(lambda _: self._pool.news.set())

    def is_ready(self, workers: Mapping[str, int]) -> bool:
        """Whether a message or result is available.

        Args:
            workers: address -> slots of the cluster's present workers, to detect tasks that wait for a lost one.
        """
        return self._future.done() or bool(self._worker and self._worker not in workers)

    def take(self) -> Any:
        """Message that the function has sent, or its result if `is_finished` is true afterwards.

        Raises:
            Lost: the process was killed.
            UserError, Failure: the function has raised an error of any type; its description in one line.
        """
        status = self._future.status
        error = self._future.exception() if status == "error" else None
        if isinstance(error, (UserError, Failure)):
            raise error
        if status == "error" and type(error).__name__ != "KilledWorker":
            raise Failure(f"a worker of the cluster failed: {type(error).__name__}: {one_line(error)}")
        found = self._future.result() if status == "finished" else None
        if found is None:
            self.cancel()
            raise Lost
        self._worker, kind, value = found
        self.is_finished = kind == "value"
        return value

    def cancel(self) -> None:
        """Withdraw the task, which ends its process."""
        self._future.cancel()
