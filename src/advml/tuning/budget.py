"""What an attack costs an image that nothing breaks, and how long it may be so that it costs no more than another.

A restart of n steps takes n forward and n backward passes, one more forward pass if the best iterate is kept, for the value of the
last one, and one for the prediction. All of them count: an attack with many restarts would get the latter for nothing otherwise.
"""

from __future__ import annotations


def passes(*, steps: int, restarts: int, keep: str) -> dict[str, int]:
    """Forward and backward passes of an attack."""
    return {"forward": restarts * (steps + _besides(keep)), "backward": restarts * steps}


def total(*, steps: int, restarts: int, keep: str) -> int:
    """Both together."""
    return sum(passes(steps=steps, restarts=restarts, keep=keep).values())


def steps_within(most: int, *, restarts: int, keep: str) -> int:
    """Steps of each restart so that all together stay within `most` passes; 0: there are too many restarts for that."""
    return max(0, (most // restarts - _besides(keep)) // 2)


def _besides(keep: str) -> int:
    """Forward passes of a restart beside those of its steps."""
    return 1 + (keep == "best")
