"""Dask schedulers and workers of a test's own, in sessions of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from ruamel.yaml import YAML


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """start("scheduler" or "worker", ...) -> a Dask process in a session of its own, ended with the test."""
    started = []

    def run(kind: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments, "--no-dashboard"]
        with (tmp_path / f"{kind}.log").open("ab") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        for member in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            member.kill()
        process.wait()


@pytest.fixture
def scheduler(start, tmp_path) -> str:
    """Address of a scheduler with one worker of one slot."""
    file = tmp_path / "scheduler.json"
    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
    start("worker", "--scheduler-file", str(file), "--nthreads", "1")
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return YAML(typ="safe").load(file)["address"]
