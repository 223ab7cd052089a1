"""Memory: what is left on this machine or in this container, and a check before much of it is taken.

Linux grants more memory than there is and kills a process that uses it; an error has to come before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from advml.core.errors import UserError
from advml.core.messages import tell

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CONSIDERABLE = 0.5  # share of the available memory from which the need is printed
# Version of control groups -> limit, use, and the lines of memory.stat that count cached files, which give way.
FILES = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def available() -> int:
    """Bytes that this process can take without swapping: of the machine, and of every control group (container) around it."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def require(need: int, *, what: str, remedy: str) -> None:
    """Print a line if `need` bytes are a considerable share of the available memory; refuse if they exceed it.

    Args:
        what: the start of the line, e.g. "60000 images of 3x32x32".
        remedy: what makes the need smaller.
    Raises:
        UserError: there is not that much memory.
    """
    left = available()
    line = f"{what} need {_size(need)} of memory"
    if need > left:
        raise UserError(f"{line}, and {_size(left)} are available here; {remedy}")
    if need > CONSIDERABLE * left:
        tell(f"note: {line} of the {_size(left)} available here")


def _left_in_groups() -> Iterator[int]:
    for version, place in _groups():
        limit, used, cached = FILES[version]
        try:
            most = int((place / limit).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (place / "memory.stat").read_text(encoding="ascii").splitlines())
            yield max(0, most - int((place / used).read_text(encoding="ascii")) + sum(int(stat.get(name, 0)) for name in cached))
        except (OSError, ValueError):  # no such group, or the limit is "max"
            continue


def _groups() -> Iterator[tuple[int, Path]]:
    """The control groups of this process, with those around them. In a container its own one is the root."""
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, CGROUPS / "memory") if controllers else (2, CGROUPS)
        place = root / path.strip("/")
        yield from ((version, group) for group in (place, *place.parents) if group == root or root in group.parents)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
