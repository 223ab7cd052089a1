"""PNG files that Pillow does not write."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(header: tuple[int, int, int, int], rows: bytes, level: int = -1) -> bytes:
    """A file from (width, height, bits, colour type) and its rows, each begun by the number of its filter."""
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows, level))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def png16(values: np.ndarray) -> bytes:
    """A file of 16 bits per channel: (H, W), or (H, W, C) with 1, 3 or 4 channels."""
    height, width, *channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png((width, height, 16, {1: 0, 3: 2, 4: 6}[channels[0] if channels else 1]), rows)
