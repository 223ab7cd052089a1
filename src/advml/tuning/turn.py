"""Turns: what one process at a time does for a study, among all that share it, kept in the study's attributes.

Who has a turn shows signs of life. The turn passes on when it is given back, when its holder is gone from this machine, or
when a holder elsewhere has shown no sign for a while by the clock of who waits: no two clocks are compared.

    >>> turn = Turn(study, url, "confirm")
    >>> with turn.waited_for(lambda holder: print(f"waiting for {holder}")):
    ...     ...                                           # nobody else is in here
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import optuna

from advml.errors import Failure, UserError
from advml.runtime import processes
from advml.tuning import census
from advml.tuning.locking import lock
from advml.tuning.storage import GRACE, HEARTBEAT

POLL = 0.5  # seconds between two looks of who waits


class Turn:
    """One process's view of a turn. `holder` says, for people, who has it if `take` did not get it."""

    def __init__(self, study: optuna.Study, url: str, name: str) -> None:
        self._study, self._url, self._key = study, url, f"{census.TURNS}{name}"
        self._token, self._ended = uuid.uuid4().hex, threading.Event()
        self._seen: tuple[dict | None, float] = None, 0.0  # the last sign of life, and when it was first seen
        self.holder: str | None = None

    def take(self) -> bool:
        """Take the turn if nobody who lives has it."""
        with lock(self._url):
            held = self._study.user_attrs.get(self._key)
            if held and not self._is_abandoned(held):
                self.holder = processes.described(held["process"])
                return False
            self._show(0)
        self._ended.clear()
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    @contextlib.contextmanager
    def waited_for(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Have the turn, once others are done with it; `tell` is called with the holder's name if there is one."""
        told = False
        while not self.take():
            if not told:
                tell(self.holder)
            told = True
            time.sleep(POLL)
        try:
            yield
        finally:
            self.give_back()

    def give_back(self) -> None:
        """End the turn. A database that is away does not matter: the turn passes on without signs of life."""
        self._ended.set()
        with contextlib.suppress(Failure, UserError), lock(self._url):
            if self._is_ours():
                self._study.set_user_attr(self._key, None)

    def _is_abandoned(self, held: dict) -> bool:
        if held != self._seen[0]:
            self._seen = held, time.monotonic()
        return processes.is_dead(held["process"]) or time.monotonic() - self._seen[1] > GRACE

    def _is_ours(self) -> bool:
        return (self._study.user_attrs.get(self._key) or {}).get("token") == self._token

    def _show(self, beat: int) -> None:
        self._study.set_user_attr(self._key, {"process": processes.this_process(), "token": self._token, "beat": beat})

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(Failure, UserError), lock(self._url):
                if self._ended.is_set() or not self._is_ours():
                    return
                self._show(beat := beat + 1)
