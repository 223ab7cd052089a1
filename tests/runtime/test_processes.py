"""Processes are told apart: from later ones of the same number, from those of other machines, containers and boots."""

from __future__ import annotations

import os
import uuid
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


@pytest.mark.parametrize("name", ["", "host:17", "host"])
def test_what_is_no_name_of_a_process_is_nobodys(name):
    assert not processes.is_dead(name)
