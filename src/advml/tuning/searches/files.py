"""Whose model and whose data a search is about, read without the packages that know all about them, which import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advml.errors import UserError
from advml.paths import Workspace


def record_of(folder: Path) -> Mapping[str, Any]:
    """The model.json of a folder."""
    try:
        return json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'model.json'} cannot be read: {error}") from None


def data_digest(root: Path) -> str:
    """The fingerprint of the prepared images."""
    path = Workspace(root).prepared / "dataset.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"there are no data in {path.parent}; make them with: advml prepare") from None
