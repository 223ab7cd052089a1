"""Arrays in a .npz file whose bytes depend on the arrays alone: NumPy's own writer puts the time of day in."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that the format knows


def to_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of a compressed .npz file, which `numpy.load` reads."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)
    return stream.getvalue()
