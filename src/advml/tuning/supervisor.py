"""The command's own process: starts workers, replaces those that are killed, and looks on until enough trials have finished.

It imports neither torch nor anything else that is slow. Workers are forked from a process that has: replacing one takes
milliseconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

import optuna
from optuna.trial import FrozenTrial

from advml.errors import Failure
from advml.runtime.signals import TERMINAL, deferred
from advml.tuning import census
from advml.tuning import study as studies
from advml.tuning.storage import GRACE
from advml.tuning.worker import Orders, work

POLL = 0.25  # seconds
# What Optuna and the figures import when they are first used.
LAZY = [
    *("optuna.storages._rdb.models", "alembic.command", "sqlalchemy.dialects.sqlite", "sqlalchemy.dialects.postgresql"),
    *("advml.figures.style", "optuna.importance", "optuna.visualization.matplotlib"),
]
PRELOADED = ["advml.tuning.attack", "advml.tuning.training", "advml.tuning.outputs", *LAZY]
MOST_DEATHS = 20  # of workers in a row without progress
LOST = 255  # exit code of a process whose end nobody saw


def processes() -> BaseContext:
    """How workers are made: forked from a process with all imports done, or, where there is no fork, from scratch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signal.SIG_IGN) for number in TERMINAL}  # inherited: these are this process's to handle
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return context


def supervise(study: optuna.Study, orders: Orders, *, workers: int, watch: Callable[[Sequence[FrozenTrial]], None]) -> None:
    """Have `workers` processes run trials until `orders.total` have finished, here or elsewhere.

    Args:
        study: opened by this process, which only reads and buries.
        watch: is shown all trials several times a second.
    Raises:
        UserError, Failure: what keeps workers from starting; or that all trials fail, or all workers die.
    """
    crew = Crew(orders)
    buried = time.monotonic()
    try:
        while True:
            # A Ctrl-C waits for the pause: it would leave half of a drawing or a transaction, or be swallowed by a finalizer.
            with deferred():
                trials = study.get_trials(deepcopy=False)
                at_work = len(census.running(trials))
                progress = len(census.finished(trials)) + sum(len(trial.intermediate_values) for trial in trials)
                if crew.deaths_since(progress) or (at_work and time.monotonic() - buried > GRACE / 2):
                    studies.bury(study, orders.url)
                    buried, trials = time.monotonic(), study.get_trials(deepcopy=False)
                watch(trials)
                if _is_done(trials, orders):
                    return
                missing = orders.total - len(census.finished(trials)) - len(census.running(trials))
                crew.fill(min(workers, crew.at_work_on(trials) + missing))
            time.sleep(POLL)
    finally:
        crew.dismiss()
        studies.bury(study, orders.url)


def _is_done(trials: Sequence[FrozenTrial], orders: Orders) -> bool:
    """Whether enough trials have finished. Raises Failure if all have failed."""
    if census.hopeless(trials, since=orders.since):
        said = census.finished(trials)[-1].user_attrs[census.REASON]
        raise Failure(f"the first {census.HOPELESS} trials all failed, the last one: {said}")
    return len(census.finished(trials)) >= orders.total


class Crew:
    """The workers of this command."""

    def __init__(self, orders: Orders) -> None:
        self.orders, self.context = orders, processes()
        self.workers: dict[int, tuple[BaseProcess, Connection]] = {}
        self.deaths, self.progress = 0, -1

    def fill(self, count: int) -> None:
        """Start workers until `count` are there."""
        for slot in range(count):
            if slot not in self.workers and len(self.workers) < count:
                ours, theirs = self.context.Pipe(duplex=False)
                process = self.context.Process(target=work, args=(self.orders, slot, theirs), daemon=True)
                process.start()
                theirs.close()
                self.workers[slot] = process, ours

    def at_work_on(self, trials: Sequence[FrozenTrial]) -> int:
        """How many of the running trials are these workers'."""
        ours = {process.pid for process, _ in self.workers.values()}
        return sum(census.pid_of(trial) in ours for trial in census.running(trials))

    def deaths_since(self, progress: int) -> bool:
        """Take the workers that have ended off the list; True if one was killed.

        Args:
            progress: a number that grows with all that is achieved: workers that only die must not be replaced for ever.
        """
        if progress > self.progress:
            self.deaths, self.progress = 0, progress
        killed = False
        for slot, (process, connection) in list(self.workers.items()):
            if process.exitcode is None:
                continue
            del self.workers[slot]
            with connection:
                _raise_what_it_said(connection)
            if process.exitcode > 0 and process.exitcode != LOST:
                raise Failure("a worker ended with an error, which stands above; the same command goes on")
            killed |= process.exitcode != 0
        self.deaths += killed
        if self.deaths > MOST_DEATHS:
            raise Failure(f"workers were killed {self.deaths} times without getting any further, perhaps for want of memory: use fewer")
        return killed

    def dismiss(self) -> None:
        """End all workers."""
        for process, _ in self.workers.values():
            process.terminate()
        for process, connection in self.workers.values():
            process.join(10)
            process.kill()
            process.join()
            connection.close()
        self.workers.clear()


def _raise_what_it_said(connection: Connection) -> None:
    """The error that a worker has sent, if any: it could not begin."""
    with contextlib.suppress(EOFError, OSError):  # nothing was sent; or half of it, by one that was killed
        kind, text = connection.recv()
        raise kind(text)
