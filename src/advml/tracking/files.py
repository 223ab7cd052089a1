"""Reading what runs are rebuilt from."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advml.errors import Failure


def read(path: Path, *, needs: tuple[str, ...] = (), remedy: str | None = None, load: Callable[[str], Any] = json.loads) -> Any:
    """The content of a JSON file.

    Args:
        remedy: what to do about a damaged one; None: DVC has it.
        load: of another format.
    Raises:
        Failure: it is not valid, or lacks one of the keys it `needs`.
    """
    try:
        value = load(path.read_text(encoding="utf-8"))
        missing = [key for key in needs if key not in value]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        remedy = remedy or f"restore it with: dvc checkout {path.parent}"
        raise Failure(f"{path} cannot be read: {' '.join(str(error).split())}; {remedy}") from None
    return value


def read_yaml(path: Path, *, needs: tuple[str, ...] = (), remedy: str | None = None) -> Any:
    """The content of a YAML file; otherwise as `read`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    def load(text: str) -> Any:
        try:
            return YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            raise ValueError(str(error)) from None

    return read(path, needs=needs, remedy=remedy, load=load)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, numbers as numbers, without empty cells."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [{key: _value(text) for key, text in row.items() if text} for row in csv.DictReader(stream)]


def digest(*paths: Path) -> str:
    """sha256 of files; of several, over those of each."""
    each = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def _value(text: str) -> Any:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
