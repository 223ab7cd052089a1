"""Files: atomic writes, sha256, and JSON, YAML and CSV, with error messages of one line for damaged files."""

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
    """Write a file atomically: a reader, or a kill, sees the old content or the new one, never a part.

    If the path is a symbolic link, the link is replaced and its target unchanged: links to files are made by DVC, into its cache
    (`cache.type symlink`), whose files must never change. Links to folders, above the file or given to `replace_folder`, are made by
    users, and are followed.
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
    """Context manager: yields a temporary folder to fill, which then replaces `folder`; a kill leaves the old one, none, or the new one.

    If `folder` is a link, for instance to a larger disk, its target is replaced, on the target's file system, and the link stays.

    Raises:
        UserError: the folder is a mount point, which cannot be replaced.
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
            os.replace(folder, old)  # moved, because deleting file by file would leave a partial folder for a moment
        os.replace(temporary, folder)
    finally:
        discard(temporary)
        discard(old)


def discard(folder: Path) -> None:
    """Delete a folder if it exists; of a link, only the link."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sha256(*contents: Path | bytes) -> str:
    """sha256 (hex) of a file or of bytes; of several contents, the sha256 of their digests."""
    each = [hashlib.sha256(one if isinstance(one, bytes) else one.read_bytes()).hexdigest() for one in contents]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def modified(path: Path) -> int:
    """Modification time of a file, in ms since 1970."""
    return int(1000 * path.stat().st_mtime)


def to_json(content: Any, *, indent: int = 2) -> bytes:
    """Encode a result as JSON; NaN and infinity, which JSON lacks, become null."""
    return (json.dumps(without_nan(content), indent=indent, allow_nan=False) + "\n").encode()


def without_nan(value: Any) -> Any:
    """Copy as plain containers in which numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *, needs: Iterable[str] = (), remedy: str, kind: type = dict) -> Any:
    """Content of a JSON or YAML file, by its suffix.

    Args:
        needs: required keys.
        remedy: how to restore a missing or damaged file, for the error.
        kind: required type of the content: dict or list.
    Raises:
        UserError: the file cannot be read, is of another type, or lacks a key.
    """
    try:
        content = (_parse_yaml if path.suffix == ".yaml" else json.loads)(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it contains no {kind.__name__}")
        if missing := [key for key in needs if key not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); {remedy}") from None
    return content


@contextlib.contextmanager
def reporting_damage(path: Path, *, remedy: str, errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Context manager: errors about the content of a file become a UserError of one line that ends with the remedy.

    Args:
        errors: further types of error, of the library that reads it.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, *errors) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise UserError(f"{path} is damaged ({reason}); {remedy}") from None


def to_yaml(content: Any, *, flow: bool | None = None) -> str:
    """Encode a value as YAML, keeping its order; `flow`: one line (True), a line per value (False), innermost lists in one line (None)."""
    from ruamel.yaml import YAML

    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = flow, False, 100_000 if flow else 120
    yaml.dump(content, stream)
    return stream.getvalue()


def _parse_yaml(text: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(str(error)) from None


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Encode rows as CSV with one column per key; a key missing in a row gives an empty cell."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, with numbers converted and empty cells left out."""

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    with path.open(encoding="utf-8", newline="") as stream:
        return [{key: value(text) for key, text in row.items() if text} for row in csv.DictReader(stream)]
