"""One GPU for each stage, as long as there are enough of them."""

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
    """Reserve a GPU of this host; yields the environment variable that shows a process this GPU alone, or {} without GPUs.

    A lock file per GPU, which the operating system releases when a process dies, keeps a user's workers of one host apart, whatever
    started them. With more stages than GPUs, stages share them in turn.
    """
    devices = _visible()
    if not devices:
        yield {}
        return
    folder = Path(tempfile.gettempdir()) / f"advml-devices-{os.getuid()}"  # users of containers may have no name
    folder.mkdir(exist_ok=True)
    for device, identity in devices.items():
        lock = FileLock(folder / identity.replace("/", "-"), thread_local=False)  # threads may end what others have begun
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        with lock:
            yield {VISIBLE: device}
        return
    yield {VISIBLE: list(devices)[next(_turns) % len(devices)]}


def _visible() -> dict[str, str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, and a name of each that all processes of the host share.

    Inside a job of a cluster, numbers may begin at 0 in every job: where nvidia-smi answers, its UUIDs tell GPUs apart.
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
