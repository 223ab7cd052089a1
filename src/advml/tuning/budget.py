"""Passes through a network that an attack takes, and how long it may be so that it takes no more than another."""

from __future__ import annotations


def passes(*, steps: int, restarts: int, keep: str) -> dict[str, int]:
    """Forward and backward passes of an attack for an image that nothing breaks.

    A restart of n steps takes n of each, one more forward pass if the best iterate is kept, for the value of the last one, and one for
    the prediction. All of them count: an attack with many restarts would get the latter for nothing otherwise.
    """
    return {"forward": restarts * (steps + _besides(keep)), "backward": restarts * steps}


def steps_within(most: int, *, restarts: int, keep: str) -> int:
    """Steps of each restart so that all together stay within `most` passes; 0: there are too many restarts for that."""
    return max(0, (most // restarts - _besides(keep)) // 2)


def _besides(keep: str) -> int:
    """Forward passes of a restart beside those of its steps."""
    return 1 + (keep == "best")
