"""The published files are found where they lie, read in the order of our test split, and refused in one line when damaged."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from advml.config import Corruptions, Data
from advml.core.errors import UserError
from advml.data.cifar import CIFAR10, PIXELS, Archive, cifar
from advml.data.corruptions import cifar_c as module
from advml.data.corruptions.cifar_c import find, read_block
from advml.data.datasets import DATASETS
from advml.data.splits import divide

SPEC = Corruptions(names="all", severities=(1, 2, 3, 4, 5))
TEST = 40  # images, instead of 10000


def data(root: Path | None, **changes: object) -> Data:
    return Data(**({"name": "cifar10", "path": root and str(root), "validation": 0.1, "test": 0.2} | changes))


def write(folder: Path, name: str = "fog", count: int = TEST) -> tuple[np.ndarray, np.ndarray]:
    """A corruption in the true format: severity s of image i is filled with 10 s + i % 10 in red and s in blue."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.zeros((5, count, 32, 32, 3), dtype=np.uint8)
    images[..., 0] = (10 * np.arange(1, 6)[:, None] + np.arange(count) % 10)[..., None, None]
    images[..., 2] = np.arange(1, 6)[:, None, None, None]
    labels = np.tile(np.random.default_rng(0).permutation(count) % 10, 5).astype(np.uint8)
    np.save(folder / f"{name}.npy", images.reshape(-1, 32, 32, 3))
    np.save(folder / "labels.npy", labels)
    return images, labels


@pytest.mark.parametrize("severity", [1, 4, 5])
def test_a_severity_is_a_fifth_of_the_file(tmp_path, severity):
    images, labels = write(tmp_path)
    read, classes = read_block(tmp_path, "fog", severity)
    assert (read.dtype, read.shape, classes.dtype) == (torch.uint8, (TEST, 3, 32, 32), torch.int64)
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), images[severity - 1])
    assert classes.tolist() == labels[:TEST].tolist()


def cut(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "cut short": (lambda folder: cut(folder, "fog.npy"), "fog.npy"),
    "empty": (lambda folder: (folder / "fog.npy").write_bytes(b""), "fog.npy"),
    "text": (lambda folder: (folder / "fog.npy").write_text("not found\n" * 20), "fog.npy"),
    "pickled": (lambda folder: np.save(folder / "fog.npy", np.array([{}] * 5), allow_pickle=True), "fog.npy"),
    "floats": (lambda folder: np.save(folder / "fog.npy", np.zeros((5, 32, 32, 3))), "fog.npy"),
    "channels first": (lambda folder: np.save(folder / "fog.npy", np.zeros((5, 3, 32, 32), np.uint8)), "fog.npy"),
    "no fifths": (lambda folder: np.save(folder / "fog.npy", np.zeros((7, 32, 32, 3), np.uint8)), "fog.npy"),
    "no images": (lambda folder: np.save(folder / "fog.npy", np.zeros((0, 32, 32, 3), np.uint8)), "fog.npy"),
    "a folder": (lambda folder: [(folder / "fog.npy").unlink(), (folder / "fog.npy").mkdir()], "fog.npy"),
    "no labels": (lambda folder: (folder / "labels.npy").unlink(), "labels.npy"),
    "short labels": (lambda folder: np.save(folder / "labels.npy", np.zeros(5, np.uint8)), "labels.npy"),
    "float labels": (lambda folder: np.save(folder / "labels.npy", np.zeros(5 * TEST)), "labels.npy"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_in_one_line(tmp_path, kind):
    write(tmp_path)
    harm, name = DAMAGE[kind]
    harm(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / name))} ") as caught:
        read_block(tmp_path, "fog", 1)
    assert "\n" not in str(caught.value)


# Finding


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "CIFAR-10-C"), ("cifar100", "CIFAR-100-C")])
def test_the_files_are_looked_for_beside_the_download(tmp_path, monkeypatch, name, folder):
    assert find(data(tmp_path, name=name), SPEC) is None
    write(tmp_path / "data" / "raw" / folder)
    monkeypatch.chdir(tmp_path)
    found = find(data(None, name=name), SPEC)
    assert found is not None and found.folder == Path("data/raw") / folder
    assert "fog" in found and "snow" not in found


OTHER = ({"name": "digits"}, {"name": "folder", "image_size": 32}, {"image_size": 64}, {"channels": 1}, {"duplicates": "drop"})


@pytest.mark.parametrize("changes", OTHER)
def test_other_data_have_no_published_files(tmp_path, changes):
    write(tmp_path / "CIFAR-10-C")
    assert find(data(tmp_path, **changes), SPEC) is None
    with pytest.raises(UserError, match=r"corruptions.folder = '.*cifar10, cifar100 .*32 "):
        find(data(tmp_path, **changes), SPEC.model_copy(update={"folder": str(tmp_path / "CIFAR-10-C")}))


def test_a_folder_that_is_named_must_exist(tmp_path):
    write(tmp_path / "elsewhere")
    assert find(data(tmp_path), SPEC.model_copy(update={"folder": str(tmp_path / "elsewhere")})).folder == tmp_path / "elsewhere"
    with pytest.raises(UserError, match=r"corruptions.folder = '.*nowhere'"):
        find(data(tmp_path), SPEC.model_copy(update={"folder": str(tmp_path / "nowhere")}))


@pytest.fixture
def archive(tmp_path, monkeypatch) -> np.ndarray:
    """CIFAR-10 with 20 training images per file and 40 test images, that of the published files; returns the test labels."""
    small = Archive(**{**vars(CIFAR10), "train_rows": 20, "test_rows": TEST})
    images, labels = write(tmp_path / "CIFAR-10-C")
    folder = tmp_path / small.folder
    folder.mkdir()
    (folder / small.class_names).write_text("\n".join(f"class{number}" for number in range(10)))
    generator = np.random.default_rng(1)
    for name, rows in small.rows.items():
        test = name == small.test
        records = generator.integers(0, 255, (rows, 1 + PIXELS)).astype(np.uint8)
        records[:, 0] = labels[:TEST] if test else generator.permutation(rows) % 10
        if test:
            records[:, 1:] = np.moveaxis(images[0], -1, 1).reshape(TEST, -1)  # the clean image is severity 1, for the comparison
        records.tofile(folder / name)
    monkeypatch.setitem(DATASETS, "cifar10", lambda section: cifar(section, small))
    monkeypatch.setitem(module.SETS, "cifar10", ("CIFAR-10-C", small))
    return labels[:TEST]


@pytest.mark.parametrize("changes", [{}, {"seed": 7}, {"max_test": 13}, {"max_test": 20, "max_train": 30, "seed": 3, "validation": 0.3}])
def test_the_files_rows_are_put_in_the_order_of_the_prepared_test_split(tmp_path, archive, changes):
    section = data(tmp_path, **changes)
    source = DATASETS["cifar10"](section)
    chosen = divide(source, section)["test"]
    found = find(section, SPEC)
    split = found.read("fog", 1)
    assert torch.equal(split.images, torch.from_numpy(source.read(chosen).images))
    assert split.labels.tolist() == source.labels[chosen].tolist()
    assert found.read("fog", 5).images[:, 0, 0, 0].sub(40).tolist() == split.images[:, 0, 0, 0].tolist()
