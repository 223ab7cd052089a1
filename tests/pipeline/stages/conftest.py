"""Stages draw figures, which takes longer than their arithmetic: with `blank_figures` they are of the right size and empty."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from matplotlib.figure import Figure

DRAW = Figure.draw


@pytest.fixture(scope="module")
def blank_figures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def drawing():
    """with drawing(): figures are drawn after all."""

    @contextlib.contextmanager
    def drawn() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "draw", DRAW)
            yield

    return drawn
