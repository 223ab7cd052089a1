"""Checkpoints: what is saved comes back to the bit, a kill leaves old or new, and nothing foreign is resumed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from advml.training import checkpoint as module
from advml.training.checkpoint import Checkpoint, Progress, discard_finished, is_unfinished, optimizer_state, restore_optimizer
from advml.training.optimization import OPTIMIZERS


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return Checkpoint(tmp_path / "scratch", "these inputs")


def progress(epoch: int = 3) -> Progress:
    generator = torch.Generator().manual_seed(epoch)
    weights = {
        "encoder.conv.weight": torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "encoder.bn.num_batches_tracked": torch.tensor(7),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "odd/name": torch.tensor([math.nan, math.inf, -0.0]),
    }
    return Progress(
        epoch=epoch,
        network=weights,
        best={key: value + 1 for key, value in weights.items()},
        best_score=-0.1,
        best_epoch=2,
        optimizer={0: {"step": torch.tensor(9.0), "exp_avg": torch.randn(4, generator=generator)}, 11: {"step": torch.tensor(9.0)}},
        history=[{"epoch": 1, "train/loss": 1 / 3}, {"epoch": 2, "train/loss": math.nan}],
    )


def bits(value: object) -> object:
    """Comparable by ==, NaN included."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return json.dumps(value)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".part" in path.name]


# The state


def test_what_is_saved_comes_back_to_the_bit(checkpoint):
    saved = progress()
    checkpoint.save(saved)
    loaded = checkpoint.load()
    assert {key: bits(value) for key, value in vars(loaded).items()} == {key: bits(value) for key, value in vars(saved).items()}
    assert not leftovers(checkpoint.folder)


def test_without_a_state_there_is_none(checkpoint):
    assert checkpoint.load() is None


def test_tied_weights_and_views_of_one_tensor_can_be_saved(checkpoint):
    whole = torch.arange(6.0)
    checkpoint.save(Progress(epoch=1, network={"whole": whole, "view": whole[2:4], "tied": whole}, best_score=0.0, best_epoch=1))
    assert checkpoint.load().network["view"].tolist() == [2, 3]


DAMAGES = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "cut within the header": lambda content: content[:100],
    "zeros, as after a power cut": lambda content: bytes(len(content)),
    "another file": lambda content: b"PK\x03\x04 this is no safetensors file at all",
    "a later version's field": lambda content: content.replace(b"best_epoch", b"test_epoch"),
    "a header that is no JSON": lambda content: content.replace(b'\\"epoch\\"', b'\\"epoch""', 1),
    "a tensor of unknown kind": lambda content: content.replace(b"optimizer/11", b"optimisers11", 1),
    "no header of ours": lambda content: content.replace(b'"progress"', b'"programs"', 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_counts_as_none(checkpoint, damage):
    checkpoint.save(progress())
    file = checkpoint.folder / "state.safetensors"
    whole = file.read_bytes()
    assert damage(whole) != whole
    file.write_bytes(damage(whole))
    assert checkpoint.load() is None


@pytest.mark.parametrize("how", ["while writing", "before the swap"])
def test_a_save_that_fails_leaves_the_old_state_whole(checkpoint, monkeypatch, how):
    checkpoint.save(progress(1))

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    def no_swap(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((module, "save_file", half) if how == "while writing" else (os, "replace", no_swap)))
    with pytest.raises((OSError, KeyboardInterrupt)):
        checkpoint.save(progress(2))
    monkeypatch.undo()
    assert checkpoint.load().epoch == 1 and not leftovers(checkpoint.folder)


# Whose state it is


def test_the_same_inputs_find_their_state_and_notes_again(checkpoint):
    checkpoint.save(progress())
    checkpoint.note(run_id="abc")
    again = Checkpoint(checkpoint.folder, "these inputs")
    assert again.load().epoch == 3 and again.notes["run_id"] == "abc" and again.orphan is None


def test_other_inputs_discard_the_state_and_name_the_orphaned_run(checkpoint):
    checkpoint.save(progress())
    checkpoint.note(run_id="abc")
    other = Checkpoint(checkpoint.folder, "other inputs")
    assert other.load() is None and other.orphan == "abc" and "run_id" not in other.notes
    assert Checkpoint(checkpoint.folder, "other inputs").orphan is None  # told once


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", None], ids=str)
def test_damaged_notes_discard_the_state(checkpoint, content):
    """Without notes nobody knows whose state it is."""
    checkpoint.save(progress())
    notes = checkpoint.folder / "notes.json"
    notes.unlink() if content is None else notes.write_bytes(content)
    again = Checkpoint(checkpoint.folder, "these inputs")
    assert again.load() is None and again.notes == {"fingerprint": "these inputs"}


def test_a_computation_is_unfinished_from_its_start_until_it_is_noted_as_finished(tmp_path, checkpoint):
    assert is_unfinished(checkpoint.folder, "these inputs")
    assert not is_unfinished(checkpoint.folder, "other inputs") and not is_unfinished(tmp_path / "nowhere", "these inputs")
    checkpoint.note(finished=True)
    assert not is_unfinished(checkpoint.folder, "these inputs")


def test_a_later_stage_discards_the_state_of_the_outputs_that_it_uses_and_no_other(checkpoint):
    discard_finished(checkpoint.folder, "these inputs")  # at work, or killed
    assert checkpoint.folder.exists()
    checkpoint.note(finished=True)
    for inputs in ("earlier inputs", None):  # of outputs that were there before
        discard_finished(checkpoint.folder, inputs)
        assert checkpoint.folder.exists()
    discard_finished(checkpoint.folder, "these inputs")
    assert not checkpoint.folder.exists()


def test_notes_add_up(checkpoint):
    checkpoint.note(run_id="a", more=1)
    checkpoint.note(run_id="b")
    assert checkpoint.notes == {"fingerprint": "these inputs", "run_id": "b", "more": 1}


# Optimisers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_takes_the_same_steps(checkpoint, name):
    def steps(model: nn.Linear, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
            model(x).square().sum().backward()
            optimizer.step()

    def fresh() -> tuple[nn.Linear, torch.optim.Optimizer]:
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, 0.5), nn.init.zeros_(model.bias)
        return model, OPTIMIZERS[name](model.parameters(), lr=0.1, weight_decay=0.01)

    whole, optimizer = fresh()
    steps(whole, optimizer, range(6))
    begun, optimizer = fresh()
    steps(begun, optimizer, range(3))
    checkpoint.save(Progress(epoch=1, network=begun.state_dict(), optimizer=optimizer_state(optimizer)))
    state = checkpoint.load()
    resumed, optimizer = fresh()
    resumed.load_state_dict(state.network)
    restore_optimizer(optimizer, state.optimizer)
    steps(resumed, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
