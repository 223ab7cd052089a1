"""Results of the parts of a long job, on disk: an interrupted job does not compute them again."""

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
    """`memo("threat_model_2/batch 3", compute)`: what `compute` gives, computed once however often the process is killed.

    Args:
        folder: of this very job, whose inputs are part of its name, so that a job of other inputs cannot read its parts; None: remembers
            nothing.
        apart: first word of a part's name -> folder, for parts that depend on something else than the others.
    """

    def __init__(self, folder: Path | None = None, *, apart: Mapping[str, Path] | None = None) -> None:
        self.folder, self.apart = folder, apart or {}

    def __call__(self, part: str, compute: Callable[[], Parts]) -> Parts:
        """Tensors by name, on the CPU. A damaged file counts as none."""
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
        """The same for what JSON can hold."""
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
    """Take the tensors of this name, and what killed processes have left half written, out of all parts below `folder`; others stay."""
    for leftover in folder.rglob("*.part"):
        leftover.unlink(missing_ok=True)
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(SafetensorError):  # a damaged part counts as none
            if tensor in (parts := load_file(path)):
                write_atomically(path, save({name: value for name, value in parts.items() if name != tensor}))
