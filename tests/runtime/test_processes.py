"""Processes are told apart: from later ones of the same number, from those of other machines, containers and boots."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from advml.runtime import processes


def test_a_step_of_the_clock_makes_nobody_dead(monkeypatch):
    me = processes.this_process()
    whole = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: whole(self) + 3600)
    assert not processes.is_dead(me) and processes.this_process() == me


def test_containers_of_one_name_do_not_judge_each_others_processes(monkeypatch, tmp_path):
    me = processes.this_process()
    pid = os.getpid()
    theirs = me.replace(f":{pid}:", ":999999999:")
    assert processes.is_dead(theirs)
    namespace = tmp_path / "pid"
    namespace.touch()
    monkeypatch.setattr(processes, "PIDS", namespace)  # as in another container: the same boot, another inode
    processes._kernel.cache_clear()
    try:
        assert processes.this_process() != me and not processes.is_dead(theirs)
    finally:
        processes._kernel.cache_clear()


def test_where_there_is_no_proc_a_process_is_known_by_its_network_card_and_start(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "BOOT", tmp_path / "none")
    monkeypatch.setattr(processes, "PIDS", tmp_path / "none")
    processes._kernel.cache_clear()
    try:
        assert f"{uuid.getnode():x}:{os.getpid()}:{psutil.Process().create_time():.2f}" in processes.this_process()
        assert not processes.is_dead(processes.this_process())
        assert processes.is_dead(processes.this_process().replace(f":{os.getpid()}:", ":999999999:"))
    finally:
        processes._kernel.cache_clear()


def test_a_process_is_told_from_a_later_one_of_the_same_number():
    where, pid, started = processes.this_process().rsplit(":", 2)
    assert int(started) == int(Path(f"/proc/{pid}/stat").read_text().split()[21])
    assert processes.is_dead(f"{where}:{pid}:{int(started) - 1}")


@pytest.fixture
def lasting() -> Iterator[str]:
    """A process that is there until the end, by name."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield f"{processes.machine()}:{process.pid}:{processes._started(process.pid)}"
    process.communicate(b"\n")


def test_orphans_are_of_dead_processes_and_of_earlier_boots_of_this_host(lasting):
    node, boot, rest = processes.this_process().split(":", 2)[0], processes._kernel().split("/")[0], lasting.split(":", 2)[2]
    assert not processes.is_orphaned(lasting)
    assert processes.is_orphaned(f"{processes.machine()}:{rest.split(':')[0]}:1")
    assert processes.is_orphaned(lasting.replace(boot, "an-earlier-boot"))
    assert not processes.is_orphaned(lasting.replace(node, "elsewhere", 1))
    assert not processes.is_orphaned(lasting.replace(node, "elsewhere", 1).replace(boot, "an-earlier-boot"))


def test_orphans_of_earlier_versions_are_told_by_their_number(lasting):
    node, pid = platform.node(), lasting.split(":")[2]
    assert not processes.is_orphaned(f"{node}:{pid}") and processes.is_orphaned(f"{node}:999999999")
    assert not processes.is_orphaned("elsewhere:999999999")


def test_where_there_is_no_boot_to_know_nobody_is_of_an_earlier_one(lasting, monkeypatch):
    monkeypatch.setattr(processes, "_kernel", lambda: "aabbccddeeff")
    assert not processes.is_orphaned(f"{platform.node()}:112233445566:{lasting.split(':')[2]}:1")
    assert not processes.is_orphaned(lasting)


def test_a_host_without_a_name_judges_nobody(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "")
    assert not processes.is_orphaned("") and not processes.is_orphaned(":999999999")


@pytest.mark.parametrize("name", ["", "host:17", "host"])
def test_what_is_no_name_of_a_process_is_nobodys(name):
    assert not processes.is_dead(name) and not processes.is_orphaned(name)
