"""Reserve a GPU for each stage, as long as there are enough."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
_turns = itertools.count()


@contextlib.contextmanager
def one_device() -> Iterator[dict[str, str]]:
    """Context manager that reserves a GPU of this host; yields the environment variable that limits a process to it, or {} without GPUs.

    Each GPU has a lock file, which the operating system releases when a process dies; it separates all workers of a user on one host.
    With more stages than GPUs, stages share GPUs in turn.
    """
    devices = _visible()
    if not devices:
        yield {}
        return
    folder = Path(tempfile.gettempdir()) / f"advml-devices-{os.getuid()}"  # not the name, which users in containers may lack
    folder.mkdir(exist_ok=True)
    for device, identity in devices.items():
        lock = FileLock(folder / identity.replace("/", "-"), thread_local=False)  # another thread may release it
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        with lock:
            yield {VISIBLE: device}
        return
    yield {VISIBLE: list(devices)[next(_turns) % len(devices)]}


def _visible() -> dict[str, str]:
    """GPUs that this process may use: name for CUDA_VISIBLE_DEVICES -> identity, the same in all processes of the host.

    The identity is nvidia-smi's UUID if available, because in jobs of a cluster, numbers may begin at 0 in every job.
    """
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        known = dict(line.split(", ") for line in answer.stdout.split("\n") if line)
    except (OSError, subprocess.CalledProcessError, ValueError):
        known = {}
    wanted = os.environ.get(VISIBLE)
    chosen = list(known) if wanted is None else [name.strip() for name in wanted.split(",") if name.strip() not in ("", "-1")]
    return {name: known.get(name, name) for name in chosen}
