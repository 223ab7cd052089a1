"""Cache of a long job's partial results on disk, so that an interrupted job does not recompute them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from advml.core.io import write_atomically

Parts = dict[str, Tensor]


class Memo:
    """Cache on disk: `memo("threat_model_2/batch 3", compute)` returns the stored result of `compute`, or computes and stores it.

    Args:
        folder: of one job; its name contains a digest of the job's inputs, so that other jobs cannot read it. None: nothing is stored.
        apart: first word of a part's name -> folder, for parts with other inputs than the rest.
    """

    def __init__(self, folder: Path | None = None, *, apart: Mapping[str, Path] | None = None) -> None:
        self.folder, self.apart = folder, apart or {}

    def __call__(self, part: str, compute: Callable[[], Parts]) -> Parts:
        """Tensors of a part by name, on the CPU; recomputed if the stored file is damaged."""
        path = self._path(part, "safetensors") if self.folder else None
        try:
            if path:
                return load_file(path)
        except (FileNotFoundError, SafetensorError):
            pass
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        if path:
            write_atomically(path, save(found))
        return found

    def json(self, part: str, compute: Callable[[], Any]) -> Any:
        """Part whose result is a JSON value instead of tensors."""
        if self.folder is None:
            return compute()
        path = self._path(part, "json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            write_atomically(path, json.dumps(compute()).encode())
            return json.loads(path.read_text(encoding="utf-8"))

    def _path(self, part: str, suffix: str) -> Path:
        folder = self.apart.get(part.split()[0], self.folder)
        return folder / f"{re.sub(r'[^a-z0-9_-]+', '.', part.lower())}.{suffix}"


def forget(folder: Path, tensor: str) -> None:
    """Remove the tensor of this name from all parts below `folder`, and partial files of killed processes."""
    for leftover in folder.rglob("*.part"):
        leftover.unlink(missing_ok=True)
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(SafetensorError):  # a damaged part is recomputed later
            if tensor in (parts := load_file(path)):
                write_atomically(path, save({name: value for name, value in parts.items() if name != tensor}))
