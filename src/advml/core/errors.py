"""The two kinds of foreseeable errors; `cli` prints either as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """The user can mend this: a wrong key, value, path or combination. Exit code 2."""


class Failure(Exception):
    """The work broke although the request was fine: NaN loss, full disk, corrupt file. Exit code 1."""
