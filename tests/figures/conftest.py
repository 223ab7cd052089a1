"""Here figures are drawn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def drawn(drawing) -> Iterator[None]:
    with drawing():
        yield
