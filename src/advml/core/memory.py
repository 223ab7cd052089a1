"""Available memory of this machine or container, and the choice between keeping data in memory or in a file.

Linux grants more memory than there is, and kills a process that uses it; so sizes are checked before memory is allocated.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil

from advml.core.errors import UserError
from advml.core.messages import tell

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
SHARE = 0.5  # largest share of the available memory that data may take; larger data are kept in a file
# Version of control groups -> file of the limit, file of the use, and lines of memory.stat that count cached files (Linux can drop these).
FILES = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def available() -> int:
    """Bytes that this process can allocate without swapping: the least that the machine and every enclosing control group have left."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def fits_in_memory(need: int, *, what: str, folder: Path, remedy: str) -> bool:
    """Whether `need` bytes fit into SHARE of the available memory; if not, print a note that they are kept in a file.

    Args:
        what: the data, as the note's first words, e.g. "60000 images of 3x32x32".
        folder: the folder of that file, and later of a second one.
        remedy: how to need less, for the error.
    Raises:
        UserError: the disk has no room for the two files either.
    """
    left = available()
    if need <= SHARE * left:
        return True
    line, disk = f"{what} need {_size(need)}, and {_size(left)} of memory are available here", shutil.disk_usage(folder).free
    if 2 * need > disk:
        raise UserError(f"{line}; in files they need {_size(2 * need)}, and the disk of {folder} has {_size(disk)}; {remedy}")
    tell(f"note: {line}; they are kept in a file and read from it as needed")
    return False


def will_read(start: int, size: int) -> bool:
    """Have the system read these bytes of a mapped file in the background, all at once and nothing else; False: it takes no such hint.

    Unasked, it waits for each page that is not in memory, and reads what lies around it, often megabytes.
    """
    if not hasattr(mmap, "MADV_WILLNEED"):  # Windows
        return False
    begin = start - start % mmap.PAGESIZE
    return _system().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(start + size - begin), mmap.MADV_WILLNEED) == 0


@cache
def _system() -> ctypes.CDLL:
    return ctypes.CDLL(None)


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
    """Version and folder of the control groups of this process and of all that enclose them; in a container, its own is the root."""
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
