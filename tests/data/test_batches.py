"""Data larger than memory: kept in files, read ahead, and the same as in memory; what has been verified is not read again."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from advml.config import Data
from advml.core import memory
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.data import prepared
from advml.data.batches import Feed
from advml.data.datasets import load, prepare, save
from advml.data.images import read_all

CPU = Machine(torch.device("cpu"))
DIGITS = Data(name="digits", validation=0.1, test=0.2, max_train=100, max_test=50, duplicates="drop")


@pytest.fixture
def little_memory(monkeypatch, tmp_path) -> None:
    """4 KiB are left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available", lambda: 4096)


def test_images_that_do_not_fit_into_memory_are_read_into_a_file_that_ends_with_the_process(little_memory, tmp_path, capsys):
    images, unreadable = read_all(lambda index: np.full((8, 8, 1), index, np.uint8), 100, size=8, channels=1)
    assert isinstance(images, np.memmap) and images[:, 0, 0, 0].tolist() == list(range(100)) and not unreadable
    assert "100 images of 1x8x8 need" in capsys.readouterr().err
    assert not list((tmp_path / ".scratch" / "prepare").iterdir())


def test_a_data_set_larger_than_memory_is_the_one_that_fits(monkeypatch, tmp_path):
    expected = prepare(DIGITS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available", lambda: 4096)
    found = prepare(DIGITS)
    assert (found.digest, found.mean, found.duplicates) == (expected.digest, expected.mean, expected.duplicates)
    save(found, "prepared")
    assert load("prepared").digest == expected.digest


def test_batches_read_ahead_are_those_of_images_in_memory(monkeypatch, dataset):
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    expected = list(Feed(dataset.train, CPU)(order, sizes=[4]))
    monkeypatch.setattr(memory, "available", lambda: 4096)
    ahead = Feed(dataset.train, CPU)
    assert not ahead.fits
    for found, wanted in zip(ahead(order, sizes=[4]), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_the_bytes_of_every_image_are_asked_for_before_it_is_read(monkeypatch, dataset, tmp_path):
    save(dataset, tmp_path)
    mapped, asked, will_read = load(tmp_path).train, [], memory.will_read
    monkeypatch.setattr(memory, "available", lambda: 0)
    monkeypatch.setattr(memory, "will_read", lambda start, size: asked.append((start, size, will_read(start, size))))
    numbers = [40, 7, 7, 0]
    list(Feed(mapped, CPU)(torch.tensor(numbers), sizes=[4]))
    accepted = hasattr(mmap, "MADV_WILLNEED")
    assert asked == [(mapped.images[number].data_ptr(), mapped.images[0].nbytes, accepted) for number in numbers]


def test_a_batch_that_cannot_be_read_ends_the_epoch(monkeypatch, dataset):
    monkeypatch.setattr(memory, "available", lambda: 0)
    with pytest.raises(IndexError):
        list(Feed(dataset.train, CPU)(torch.tensor([0, 10**6]), sizes=[1]))


def test_files_that_had_their_digest_are_not_read_for_it_again(dataset, tmp_path, monkeypatch):
    save(dataset, tmp_path / "prepared")
    made, verified = [], tmp_path / "verified"
    digest = prepared.digest
    monkeypatch.setattr(prepared, "digest", lambda *given: (made.append(1), digest(*given))[1])
    for _ in range(3):
        assert load(tmp_path / "prepared", verified=verified).digest == dataset.digest
    assert len(made) == 1
    load(tmp_path / "prepared")
    assert len(made) == 2


@pytest.mark.parametrize("change", [lambda path: os.utime(path, ns=(1, 1)), lambda path: path.write_bytes(path.read_bytes())])
def test_a_file_that_may_have_changed_is_read_again(dataset, tmp_path, change):
    save(dataset, tmp_path / "prepared")
    verified, path = tmp_path / "verified", tmp_path / "prepared" / "test.safetensors"
    load(tmp_path / "prepared", verified=verified)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1  # a label
    path.write_bytes(damaged)
    change(Path(path))
    with pytest.raises(UserError, match="digest does not match"):
        load(tmp_path / "prepared", verified=verified)
