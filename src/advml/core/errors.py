"""The two kinds of foreseeable errors, which `cli` prints as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can fix: a wrong key, value, path or combination. Exit code 2."""


class Failure(Exception):
    """A failure of a valid request: NaN loss, full disk, corrupt file. Exit code 1."""
