"""One GPU for each stage, with names of GPUs that this machine need not have."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from advml.engine.devices import VISIBLE, one_device

HOLD = """
import time
from advml.engine.devices import one_device
with one_device() as found:
    print(found, flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def locks(monkeypatch, tmp_path):
    """Lock files of this test alone, and no nvidia-smi."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("PATH", "/nowhere")


def test_four_stages_at_once_get_four_devices_and_more_stages_share_them(monkeypatch):
    monkeypatch.setenv(VISIBLE, "0,1,2,3")
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(one_device())[VISIBLE] for _ in range(4)]
        assert sorted(found) == ["0", "1", "2", "3"]
        with one_device() as fifth:
            assert fifth[VISIBLE] in found
    with one_device() as again:
        assert again == {VISIBLE: "0"}


def test_another_process_keeps_its_device_until_it_is_killed(monkeypatch):
    monkeypatch.setenv(VISIBLE, "4,GPU-5f/6")
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    try:
        assert "'4'" in process.stdout.readline()
        with one_device() as ours:
            assert ours == {VISIBLE: "GPU-5f/6"}
    finally:
        process.kill()
        process.communicate()
    with one_device() as ours:
        assert ours == {VISIBLE: "4"}


@pytest.mark.parametrize("visible", [None, "", "-1"])
def test_without_a_gpu_nothing_is_set(monkeypatch, visible):
    monkeypatch.delenv(VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    with one_device() as found:
        assert found == {}


def test_gpus_are_told_apart_by_their_uuid_where_every_job_counts_from_zero(monkeypatch, tmp_path):
    """Two jobs of one host see one GPU each, which both call 0."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "0, GPU-$JOB"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setenv("JOB", "a")
    with one_device() as first:
        monkeypatch.setenv("JOB", "b")
        with one_device() as second:
            assert first == second == {VISIBLE: "0"}
            assert len([path for path in tmp_path.glob("advml-devices-*/*")]) == 2
