"""Files of arrays: the same bytes for the same arrays, readable by NumPy alone."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest

from advml.similarity.represent import to_npz

ARRAYS = {
    "clean": np.random.default_rng(0).normal(size=(5, 7)),
    "CL-AT-s0/SL-AT-s0/adversarial": np.full((2, 3, 4), np.nan),
    "counted": np.array([True, False]),
    "sizes": np.array([128, 44]),
    "nothing": np.empty((0, 3)),
    "number": np.array(2.5, dtype=np.float32),
    "transposed": np.arange(6.0).reshape(2, 3).T,
}


def test_numpy_reads_what_was_written_without_pickle():
    with np.load(io.BytesIO(to_npz(ARRAYS)), allow_pickle=False) as stored:
        assert stored.files == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(stored[name], array, strict=True)  # shape and type as well


def test_the_bytes_depend_on_the_arrays_alone(monkeypatch):
    first, now = to_npz(ARRAYS), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(now + 1e6))
    assert to_npz({name: array.copy() for name, array in ARRAYS.items()}) == first
    assert to_npz({name: np.array(array, order="F") for name, array in ARRAYS.items()}) == first
    assert to_npz(ARRAYS | {"sizes": np.array([128, 45])}) != first


def test_objects_are_refused():
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        to_npz({"names": np.array(["a", None], dtype=object)})
