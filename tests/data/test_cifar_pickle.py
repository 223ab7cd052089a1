"""The python version of CIFAR is read without `pickle`: as the binary version of the same images, and nothing else in a pickle is."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from advml.config import Data
from advml.core.errors import UserError
from advml.data.cifar import CIFAR10, CIFAR10_PYTHON, CIFAR100, CIFAR100_PYTHON, cifar
from advml.data.cifar_pickle import read_pickle
from advml.data.datasets import DATASETS, prepare

ROWS = 12


class Python2(pickle._Pickler):
    """Writes text and bytes as Python 2's `str`, as the published files have them."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012 - as in the class above it

    def save_text(self, value: str | bytes) -> None:
        content = value if isinstance(value, bytes) else value.encode("latin-1")
        size = len(content)
        self.write((b"U" + bytes([size]) if size < 256 else b"T" + size.to_bytes(4, "little")) + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def pickled(value: object, *, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    Python2(stream, protocol=protocol).dump(value)
    return stream.getvalue()


def batch(seed: int, rows: int = ROWS) -> dict[str, object]:
    """A batch of the published layout, of both data sets at once."""
    random = np.random.default_rng(seed)
    labels = [number % 2 for number in range(rows)]
    return {
        "batch_label": f"batch {seed}",
        "labels": labels,
        "fine_labels": labels,
        "coarse_labels": [19] * rows,
        "data": random.integers(0, 256, (rows, 3072), dtype=np.uint8),
        "filenames": ["same.png"] * rows,
    }


def same(one: object, other: object) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other and type(one) is type(other)


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_pickle_would_load_is_read(order):
    value = batch(0) | {"data": np.asarray(batch(0)["data"], order=order)}
    value |= {
        "more": {"tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "numbers": [-1, 0, 255, 256, 65536, True, None], "bytes": "\xff\0"}
    }
    content = pickled(value)
    read, loaded = read_pickle(content), pickle.loads(content, encoding="latin-1")
    assert read.keys() == loaded.keys() and all(same(read[key], loaded[key]) for key in loaded)


def test_old_numpys_name_of_the_array_is_known():
    content = pickled(batch(0)).replace(b"numpy._core.", b"numpy.core.")
    assert same(read_pickle(content)["data"], batch(0)["data"])


class Runs:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


REFUSED = {
    "a call": pickled({"data": Runs()}),
    "a class": pickled({"data": Path}),
    "a type": pickled({"data": np.uint8}),
    "a bare call of numpy": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nK\x01\x85R(K\x01tb.",
    "another type": pickled({"data": np.zeros(3, np.int64)}),
    "objects": pickled({"data": np.array([Runs()], dtype=object)}),
    "another protocol": pickle.dumps({"data": b""}, protocol=4),
    "a persistent id": b"\x80\x02U\x01xQ.",
    "an instance": b"(ios\nsystem\nU\x01x.",
    "a wrong shape": pickled({"data": np.zeros((2, 3), np.uint8)}).replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86"),
    "an item of a number": b"\x80\x02K\x01K\x02a.",
    "a text as a list": b"\x80\x02U\x01xK\x02a.",
    "half a file": pickled(batch(0))[:-100],
    "nothing": b"",
    "no pickle": b"<html>404</html>",
}


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_refused_and_nothing_runs(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        read_pickle(REFUSED[case])
    assert not list(tmp_path.iterdir())


def write(root: Path, binary, python, *, label_bytes: int):
    """The same images in both versions below `root`; returns the archives with their few rows."""
    small = [dataclasses.replace(archive, train_rows=ROWS, test_rows=ROWS) for archive in (binary, python)]
    for archive in small:
        (root / archive.folder).mkdir()
    (root / binary.folder / binary.class_names).write_text("apple\nbear\n")
    (root / python.folder / python.class_names).write_bytes(
        pickled({"label_names": ["apple", "bear"], "fine_label_names": ["apple", "bear"]})
    )
    for seed, (one, other) in enumerate(zip((*binary.train, binary.test), (*python.train, python.test), strict=True)):
        content = batch(seed)
        (root / python.folder / other).write_bytes(pickled(content))
        labels = np.array([content["coarse_labels"], content["fine_labels"]], np.uint8).T[:, -label_bytes:]
        (root / binary.folder / one).write_bytes(np.hstack((labels, content["data"])).tobytes())
    return small


@pytest.mark.parametrize(
    ("binary", "python", "label_bytes"), [(CIFAR10, CIFAR10_PYTHON, 1), (CIFAR100, CIFAR100_PYTHON, 2)], ids=["10", "100"]
)
def test_both_versions_give_the_same_data_set(tmp_path, monkeypatch, binary, python, label_bytes):
    archives, digests = write(tmp_path, binary, python, label_bytes=label_bytes), []
    for archive in archives:
        monkeypatch.setitem(DATASETS, "cifar10", lambda data, archive=archive: cifar(data, archive))
        for path in (tmp_path, tmp_path / archive.folder):
            dataset = prepare(Data(name="cifar10", path=str(path), validation=0.1, test=0.2))
            digests.append(dataset.digest)
            assert dataset.classes == ("apple", "bear") and len(dataset.test) == ROWS
    assert len(set(digests)) == 1


@pytest.fixture
def tiny(tmp_path):
    return write(tmp_path, CIFAR10, CIFAR10_PYTHON, label_bytes=1)


def section(root: Path) -> Data:
    return Data(name="cifar10", path=str(root), validation=0.1, test=0.2)


def test_the_python_archive_is_checked_and_extracted_where_the_binary_one_is_missing(tmp_path, monkeypatch, tiny):
    binary, python = tiny
    for path in (tmp_path / binary.folder).iterdir():
        path.unlink()
    expected = cifar(section(tmp_path), python).labels
    with tarfile.open(tmp_path / python.name, "w:gz") as tar:
        tar.add(tmp_path / python.folder, python.folder)
    for path in (tmp_path / python.folder).iterdir():
        path.unlink()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("downloads"))
    right = dataclasses.replace(python, md5=hashlib.md5((tmp_path / python.name).read_bytes()).hexdigest())
    assert (cifar(section(tmp_path), binary, right).labels == expected).all()


def test_an_archive_of_another_checksum_is_named_and_not_extracted(tmp_path, monkeypatch, tiny):
    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for archive in tiny:
        for path in (tmp_path / archive.folder).iterdir():
            path.unlink()
    (tmp_path / CIFAR10_PYTHON.name).touch()
    with pytest.raises(UserError, match=rf"^{CIFAR10_PYTHON.name} .*put {CIFAR10.name} or {CIFAR10_PYTHON.name} into") as error:
        cifar(section(tmp_path), *tiny)
    assert "\n" not in str(error.value)


WRONG = {
    "a row too few": lambda content: content | {"data": content["data"][1:]},
    "labels of the other set": lambda content: {key: value for key, value in content.items() if key != "labels"},
    "a label too many": lambda content: content | {"labels": content["labels"] + [0]},
    "an unknown class": lambda content: content | {"labels": [2] * ROWS},
    "no array": lambda content: content | {"data": "x" * ROWS * 3072},
    "text for labels": lambda content: content | {"labels": ["a"] * ROWS},
    "code": lambda content: content | {"filenames": Runs()},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_not_as_published_is_named_in_one_line(tmp_path, tiny, case):
    path = tmp_path / CIFAR10_PYTHON.folder / "data_batch_3"
    path.write_bytes(pickled(WRONG[case](batch(2))) + b"\0" * 3072)  # as large as it should be
    with pytest.raises(UserError, match=r"data_batch_3 is damaged \(.+\); delete it") as error:
        cifar(section(tmp_path), tiny[1])
    assert "\n" not in str(error.value)
