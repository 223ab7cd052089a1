"""Files: written whole or not at all, told apart by their sha256, read with one line for what is wrong with them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from advml.core.errors import UserError
from advml.core.io import read_csv, read_json, replace_folder, sha256, to_json, write_atomically


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".part" in path.name]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "metrics.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and not leftovers(tmp_path)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and not leftovers(tmp_path)


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "models" / "CL-AT-s0"
    for content in ("old", "new"):
        with replace_folder(target) as folder:
            (folder / content).write_text(content)
            assert not (target / content).exists()
    assert [path.name for path in target.iterdir()] == ["new"] and [path.name for path in target.parent.iterdir()] == ["CL-AT-s0"]


def test_a_folder_survives_a_failure_while_its_successor_is_filled(tmp_path):
    target = tmp_path / "CL-AT-s0"
    with replace_folder(target) as folder:
        (folder / "old").touch()
    with pytest.raises(RuntimeError), replace_folder(target) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"] and [path.name for path in tmp_path.iterdir()] == ["CL-AT-s0"]


def test_a_kill_between_two_renames_leaves_no_half_folder(tmp_path, monkeypatch):
    """The old folder goes aside whole; only then is it deleted."""
    target, seen = tmp_path / "CL-AT-s0", []
    with replace_folder(target) as folder:
        (folder / "old").touch()
    rename = os.replace

    def watch(source, destination):
        seen.append(sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()))
        rename(source, destination)

    monkeypatch.setattr(os, "replace", watch)
    with replace_folder(target) as folder:
        (folder / "new").touch()
    assert seen == [[".CL-AT-s0.part/new", "CL-AT-s0/old"], [".CL-AT-s0.old/old", ".CL-AT-s0.part/new"]]
    assert [path.name for path in target.iterdir()] == ["new"] and [path.name for path in tmp_path.iterdir()] == ["CL-AT-s0"]


def test_what_a_killed_process_left_behind_does_not_get_into_the_folder(tmp_path):
    (tmp_path / ".CL-AT-s0.part").mkdir()
    (tmp_path / ".CL-AT-s0.part" / "stale").touch()
    with replace_folder(tmp_path / "CL-AT-s0") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "CL-AT-s0").iterdir()] == ["new"]


@pytest.mark.parametrize("exists", [True, False], ids=["a folder", "dangling"])
def test_a_link_to_a_folder_stays_and_its_target_is_replaced(tmp_path, exists):
    link, target = tmp_path / "data" / "prepared", tmp_path / "disk" / "here"
    link.parent.mkdir()
    target.parent.mkdir()
    link.symlink_to(Path("../disk/here"))
    if exists:
        target.mkdir()
        (target / "before").touch()
    for content in ("old", "new", "newest"):
        with replace_folder(link) as folder:
            assert folder.parent == target.parent  # on the target's file system, where it can be renamed
            (folder / content).touch()
    assert link.is_symlink() and [path.name for path in link.iterdir()] == ["newest"]
    assert sorted(path.name for path in (*target.parent.iterdir(), *link.parent.iterdir())) == ["here", "prepared"]


def test_a_link_that_an_earlier_version_has_put_aside_is_no_obstacle(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / ".CL-AT-s0.old").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        with replace_folder(tmp_path / "CL-AT-s0") as folder:
            (folder / "new").touch()
    assert not (tmp_path / ".CL-AT-s0.old").is_symlink() and (tmp_path / "elsewhere" / "kept").exists()


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    (tmp_path / "prepared").symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match=r"prepared leads to .*disk, a mount point"), replace_folder(tmp_path / "prepared"):
        pytest.fail("it is filled")
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_a_link_to_a_file_is_replaced_and_its_target_left_alone(tmp_path):
    """DVC under `cache.type symlink`: the target is in its cache, under the digest of its content."""
    cached, output = tmp_path / "cache" / "0a1b", tmp_path / "reports" / "metrics.json"
    cached.parent.mkdir()
    cached.write_bytes(b"old")
    output.parent.mkdir()
    output.symlink_to(cached)
    write_atomically(output, b"new")
    assert output.read_bytes() == b"new" and not output.is_symlink() and cached.read_bytes() == b"old"


def test_a_folder_of_links_to_files_is_replaced_and_their_targets_left_alone(tmp_path):
    (tmp_path / "cached").write_bytes(b"old")
    (tmp_path / "CL-AT-s0").mkdir()
    (tmp_path / "CL-AT-s0" / "model.json").symlink_to(tmp_path / "cached")
    with replace_folder(tmp_path / "CL-AT-s0") as folder:
        (folder / "model.json").write_bytes(b"new")
    assert (tmp_path / "CL-AT-s0" / "model.json").read_bytes() == b"new" and (tmp_path / "cached").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting"),
        (b"[]", "no dict"),
        (b'{"a": 1}', "b"),
        (b"\xff", "decode"),
        (b"[" * 100_000, "(recursion|overflow)"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_such_record_is_one_line_with_path_reason_and_remedy(tmp_path, content, reason):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path} .*{reason}.*; do this$") as refused:
        read_json(path, needs=("a", "b"), remedy="do this")
    assert "\n" not in str(refused.value)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, to_json({"a": 1.5, "b": [float("nan"), float("inf")], "c": {"d": None}}))
    assert read_json(path, needs=("a",), remedy="") == {"a": 1.5, "b": [None, None], "c": {"d": None}}
    path.write_text("[1]")
    assert read_json(path, kind=list, remedy="") == [1]
    path = tmp_path / "record.yaml"
    path.write_text("a: {b: 1e-3}")
    assert read_json(path, remedy="") == {"a": {"b": 0.001}}
    path.write_text("a: [")
    with pytest.raises(UserError, match=str(path)):
        read_json(path, remedy="")


def test_a_table_has_numbers_as_numbers_and_no_empty_cells(tmp_path):
    (tmp_path / "table.csv").write_text('model,n,accuracy,note\nCL-AT-s0,40,9.5e-1,\n"a, b",-1,,007\n')
    assert read_csv(tmp_path / "table.csv") == [{"model": "CL-AT-s0", "n": 40, "accuracy": 0.95}, {"model": "a, b", "n": -1, "note": "007"}]


def test_digests_are_of_content_and_of_several_in_their_order(tmp_path):
    first, second = (tmp_path / name for name in "ab")
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    assert sha256(first) == sha256(b"1") == hashlib.sha256(b"1").hexdigest()
    assert sha256(first, second) == sha256(b"1", second) != sha256(second, first)
    assert sha256(first, second) == hashlib.sha256((sha256(first) + sha256(second)).encode()).hexdigest()
