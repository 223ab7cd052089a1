"""What a job has finished is computed once; nothing that a file lacks is believed."""

from __future__ import annotations

import pytest
import torch

from advml.core.result_cache import Memo, forget


def never() -> None:
    raise AssertionError("computed although it was remembered")


def test_tensors_are_computed_once_and_read_back_by_name(tmp_path):
    made = {"right": torch.tensor([True, False]), "images": torch.rand(2, 1, 3, 3)}
    first = Memo(tmp_path)("worst_case/square batch 3", lambda: made)
    again = Memo(tmp_path)("worst_case/square batch 3", never)
    for found in (first, again):
        assert set(found) == set(made) and all(torch.equal(found[name], made[name]) for name in made)


def test_what_json_holds_is_computed_once_and_the_same_the_first_time_as_later(tmp_path):
    first = Memo(tmp_path).json("diagnostics", lambda: {"flags": ("a", "b"), "share": 0.1, "none": None})
    assert first == Memo(tmp_path).json("diagnostics", never) == {"flags": ["a", "b"], "share": 0.1, "none": None}


def test_tensors_come_without_history_contiguous_and_on_the_cpu(tmp_path):
    given = torch.rand(2, 3, requires_grad=True).T
    for folder in (None, tmp_path):
        found = Memo(folder)("x", lambda: {"x": given})["x"]
        assert not found.requires_grad and found.is_contiguous() and found.device.type == "cpu" and torch.equal(found, given)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_file_counts_as_none_and_is_written_anew(tmp_path, content):
    memo = Memo(tmp_path)
    memo("x", lambda: {"x": torch.zeros(2)})
    memo.json("x", lambda: 1)
    for path in tmp_path.iterdir():
        path.write_bytes(content)
    assert memo("x", lambda: {"x": torch.ones(2)})["x"].sum() == 2 and memo.json("x", lambda: 2) == 2
    assert memo("x", never)["x"].sum() == 2 and memo.json("x", never) == 2


def test_without_a_folder_nothing_is_remembered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memo, calls = Memo(), []
    for _ in range(2):
        memo("x", lambda: calls.append("tensors") or {"x": torch.zeros(1)})
        memo.json("x", lambda: calls.append("json"))
    assert calls == ["tensors", "json"] * 2 and not list(tmp_path.iterdir())


def test_every_part_has_a_file_of_its_own_under_a_name_that_every_file_system_takes(tmp_path):
    memo = Memo(tmp_path / "job")
    parts = (
        "accuracy/threat_model_2 batch 1",
        "accuracy/threat_model_2 batch 11",
        "accuracy/threat_model_2_half batch 1",
        "worst_case/fab-t",
    )
    for number, part in enumerate(parts):
        memo(part, lambda number=number: {"x": torch.tensor(number)})
    memo.json(parts[0], lambda: "of its own")
    assert [int(memo(part, never)["x"]) for part in parts] == [0, 1, 2, 3] and memo.json(parts[0], never) == "of its own"
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == [
        "accuracy.threat_model_2.batch.1.json",
        "accuracy.threat_model_2.batch.1.safetensors",
        "accuracy.threat_model_2.batch.11.safetensors",
        "accuracy.threat_model_2_half.batch.1.safetensors",
        "worst_case.fab-t.safetensors",
    ]


def test_what_fails_leaves_nothing_behind(tmp_path):
    for remember in (Memo(tmp_path), Memo(tmp_path).json):
        with pytest.raises(AssertionError):
            remember("x", never)
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_forgotten_go_and_the_others_stay(tmp_path):
    memo = Memo(tmp_path / "job")
    memo("figure batch 1", lambda: {"right": torch.ones(3), "images": torch.rand(3, 1, 8, 8)})
    memo("figure batch 2", lambda: {"right": torch.zeros(2)})
    (tmp_path / "job" / "damaged.safetensors").write_bytes(b"{")
    (tmp_path / "job" / "figure.batch.3.safetensors.77.part").write_bytes(b"half of the images")  # of a process that was killed
    for _ in range(2):
        forget(tmp_path, "images")
        found = [memo(f"figure batch {number}", never) for number in (1, 2)]
        assert [set(part) for part in found] == [{"right"}] * 2 and [int(part["right"].sum()) for part in found] == [3, 0]
    assert not list(tmp_path.rglob("*.part"))
    forget(tmp_path / "nowhere", "images")
