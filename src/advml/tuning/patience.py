"""Waiting for a database that is busy or away, and what is said of one that stays so."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy
from optuna.exceptions import StorageInternalError

from advml.errors import Failure

T = TypeVar("T")
# The second: a transaction whose connection was cut, which Optuna rolls back when it meets it
PASSING = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.PendingRollbackError)
PATIENCE = 60.0  # seconds that a busy or restarting database is waited for


class StorageGone(Failure):
    """The database does not answer: whatever was at work is not to blame."""


def patiently(action: Callable[[], T]) -> T:
    """`action()`, again and again while the database is busy or away; use it for what may be done twice.

    Raises:
        StorageGone: it has been so for a minute.
        Failure: it answers, and refuses.
    """
    give_up, pause = time.monotonic() + PATIENCE, 0.01
    while True:
        try:
            return action()
        except (StorageInternalError, sqlalchemy.exc.DBAPIError) as error:
            if not is_passing(error):
                raise Failure(f"the studies' database refuses: {reason(error)}") from error
            if time.monotonic() > give_up:
                raise StorageGone(f"the studies' database does not answer: {reason(error)}; the same command goes on") from error
            time.sleep(pause * random.uniform(0.5, 1.5))  # together with others, so not in step with them
            pause = min(2 * pause, 2.0)


def is_passing(error: BaseException) -> bool:
    """Whether the same may work a moment later: the database is locked, restarting, or has cut the connection."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, PASSING) or getattr(cause, "connection_invalidated", False)


def reason(error: BaseException) -> str:
    """The first line of what the database said."""
    cause = error.__cause__ or error
    return (str(getattr(cause, "orig", None) or cause).strip() or type(cause).__name__).split("\n")[0]
