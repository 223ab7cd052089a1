"""What is left of the machine's memory and of a container's limit, and the line before much of it is taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from advml.config import Data
from advml.core import memory
from advml.core.errors import UserError
from advml.data.datasets import prepare

GIB = 2**30


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Path:
    """64 GiB are left on the machine, and there is no control group; returns the folder for groups."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    return tmp_path / "groups"


def group(place: Path, *, version: int, limit: object, used: int, cached: int = 0) -> None:
    place.mkdir(parents=True, exist_ok=True)
    names = {2: ("memory.max", "memory.current", ""), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")}
    most, current, prefix = names[version]
    (place / most).write_text(f"{limit}\n")
    (place / current).write_text(f"{used}\n")
    (place / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cached}\n{prefix}active_file 0\n")


def test_without_groups_it_is_what_the_machine_has(machine):
    assert memory.available() == 64 * GIB
    memory.OWN.write_text("0::/\n")  # a group without a limit file, as the root has none
    assert memory.available() == 64 * GIB


def test_a_containers_limit_counts_without_the_files_that_are_cached(machine):
    memory.OWN.write_text("0::/\n")
    group(machine, version=2, limit=8 * GIB, used=5 * GIB, cached=GIB)
    assert memory.available() == 4 * GIB


def test_the_tightest_group_around_a_process_counts(machine):
    memory.OWN.write_text("0::/user/session\n")
    group(machine / "user", version=2, limit=6 * GIB, used=GIB)
    group(machine / "user" / "session", version=2, limit="max", used=GIB)
    group(machine / "other", version=2, limit=1, used=0)
    assert memory.available() == 5 * GIB


@pytest.mark.parametrize("path", ["/", "/docker/abc"])
def test_the_older_groups_count_too(machine, path):
    memory.OWN.write_text(f"5:cpu,cpuacct:{path}\n4:memory:{path}\n0::/\n")
    group(machine / "memory", version=1, limit=4 * GIB, used=GIB, cached=GIB // 2)  # in a container its own group is the root
    assert memory.available() == 3.5 * GIB


def test_a_group_beyond_its_limit_leaves_nothing(machine):
    memory.OWN.write_text("0::/\n")
    group(machine, version=2, limit=GIB, used=2 * GIB)
    assert memory.available() == 0


@pytest.fixture
def disk(monkeypatch) -> None:
    """100 GiB are left on the disk."""
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 * GIB))


@pytest.mark.parametrize(("need", "kept"), [(32 * GIB, True), (33 * GIB, False)])
def test_what_would_take_more_than_its_share_of_memory_goes_to_a_file_and_a_line_says_so(machine, disk, capsys, need, kept):
    assert memory.fits_in_memory(need, what="9 images", folder=Path(), remedy="take fewer") is kept
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == (not kept) and ("9 images need 33.0 GiB, and 64.0 GiB of memory" in err) is not kept


def test_what_fits_neither_into_memory_nor_on_the_disk_is_refused_with_the_remedy(machine, disk, capsys):
    with pytest.raises(UserError, match=r"9 images .*51\.0 GiB.*102\.0 GiB.*100\.0 GiB"):
        memory.fits_in_memory(51 * GIB, what="9 images", folder=Path(), remedy="take fewer")
    assert capsys.readouterr() == ("", "")


def test_a_data_set_that_fits_nowhere_is_refused_before_it_is_read(machine, disk):
    with pytest.raises(UserError, match=r"1797 images of 3x\d+x\d+ need .* GiB.*data\.image_size.*data\.max_train"):
        prepare(Data(name="digits", validation=0.1, test=0.2, image_size=4096, channels=3))
