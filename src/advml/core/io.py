"""Files, whole or not at all: written in one step, told apart by their sha256, read with one line for whatever is wrong with them."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from advml.core.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader or a kill sees the old content or the new one, never half.

    A link in place of the file is replaced, and its target left alone: links to files are DVC's, into its cache (`cache.type
    symlink`), whose files must never change. Links to folders, above the file or given to `replace_folder`, are the user's and stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder beside `folder`, then put it in its place: a kill leaves the old folder, none or the new one, never half of one.

    Where `folder` is a link, to a larger disk for instance, all this happens to its target, on the target's file system; the link stays.

    Raises:
        UserError: the folder is the root of a file system, which no other one can take the place of.
    """
    given, folder = folder, Path(os.path.realpath(folder))
    if os.path.ismount(folder):
        remedy = "link to a folder in there, or mount it one folder higher"
        raise UserError(f"{given} leads to {folder}, a mount point, which cannot be replaced; {remedy}")
    temporary, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("part", "old"))
    discard(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        discard(old)
        if folder.is_dir():
            os.replace(folder, old)  # aside: deleting file by file would leave half of it for a moment
        os.replace(temporary, folder)
    finally:
        discard(temporary)
        discard(old)


def discard(folder: Path) -> None:
    """Delete a folder; a missing one is fine, and of a link only the link goes."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sha256(*contents: Path | bytes) -> str:
    """sha256 (hex) of a file or of bytes; of several, over the digests of each."""
    each = [hashlib.sha256(one if isinstance(one, bytes) else one.read_bytes()).hexdigest() for one in contents]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def modified(path: Path) -> int:
    """When a file was written, in ms since 1970."""
    return int(1000 * path.stat().st_mtime)


def to_json(content: Any, *, indent: int = 2) -> bytes:
    """A result as the text of its file. JSON has no NaN and no infinity: what could not be measured is null."""
    return (json.dumps(_without_nan(content), indent=indent, allow_nan=False) + "\n").encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *, needs: Iterable[str] = (), remedy: str, kind: type = dict) -> Any:
    """The content of a JSON or YAML file, by its suffix.

    Args:
        needs: keys that it must have.
        remedy: what to do about a file that is missing or damaged.
        kind: dict, or list.
    Raises:
        UserError: the file cannot be read, or its content is another than that.
    """
    try:
        content = (_parse_yaml if path.suffix == ".yaml" else json.loads)(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it holds no {kind.__name__}")
        if missing := [key for key in needs if key not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); {remedy}") from None
    return content


def _parse_yaml(text: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(str(error)) from None


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as the text of a CSV file, a column per key; a key that a row lacks is an empty cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, numbers as numbers, without empty cells."""

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    with path.open(encoding="utf-8", newline="") as stream:
        return [{key: value(text) for key, text in row.items() if text} for row in csv.DictReader(stream)]
