"""Writing to a run: whatever goes wrong becomes one warning line, and the work goes on."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advml.tracking import store as stores
from advml.tracking.signals import deferred

if TYPE_CHECKING:
    from mlflow.entities import Run as Record

TABLES = "mlflow.loggedArtifacts"


def guarded(method: Callable) -> Callable:
    """A method that does nothing once the store has failed, and that never raises."""

    @functools.wraps(method)
    def call(self: Writer, *args: Any, **kwargs: Any) -> Any:
        if self._store is None:
            return None
        try:
            with deferred():
                return method(self, *args, **kwargs)
        except Exception as error:
            if self._strict:
                raise
            self._store = None
            stores.give_up(self._place, error)

    return call


class Writer:
    """Tags and artifacts of one run. `id` is None where there is no store; a `strict` writer raises."""

    def __init__(self, place: stores.Place, store: stores.Store | None, record: Record | None, *, strict: bool) -> None:
        self._place, self._store, self._strict = place, store, strict
        self.id: str | None = record.info.run_id if record else None
        self.name: str | None = record.info.run_name if record else None
        self._tags: dict[str, str] = dict(record.data.tags) if record else {}

    @guarded
    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Copy a file into the artifacts, under its own name."""
        self._store.client.log_artifact(self.id, str(file), folder)

    @guarded
    def has_file(self, file: Path, folder: str) -> bool:
        """Whether `folder` of the artifacts holds this file, byte for byte."""
        name = f"{folder}/{file.name}"
        if name not in {entry.path for entry in self._store.client.list_artifacts(self.id, folder)}:
            return False
        with tempfile.TemporaryDirectory() as place:
            return Path(self._store.client.download_artifacts(self.id, name, place)).read_bytes() == file.read_bytes()

    @guarded
    def log_figure(self, figure: Any, path: str) -> None:
        """Store a matplotlib figure as the artifact `path`, e.g. `figures/robustness.png`."""
        self._store.client.log_figure(self.id, figure, path)

    @guarded
    def log_image(self, image: Any, *, key: str, step: int = 0) -> None:
        """Store a PIL image, an array (H, W, C) or an image file for the UI's image grid, which compares runs by `key`."""
        if isinstance(image, (str, Path)):
            from PIL import Image

            with Image.open(image) as opened:
                image = opened.copy()
        self._store.client.log_image(self.id, image, key=key, step=step)

    @guarded
    def log_table(self, rows: Sequence[Mapping[str, Any]], path: str) -> None:
        """Store rows as the table `path` (.json), which the UI shows and compares across runs; replaces an earlier one.

        MLflow's own log_table appends to what is there, so a repeated stage would double its rows.
        """
        columns = list(dict.fromkeys(key for row in rows for key in row))
        self._store.client.log_dict(self.id, {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]}, path)
        tables, table = json.loads(self._tags.get(TABLES, "[]")), {"path": path, "type": "table"}
        if table not in tables:
            self._tag({TABLES: json.dumps([*tables, table])})

    def tag(self, key: str) -> str | None:
        """The value of a tag, as far as this process knows."""
        return self._tags.get(key)

    @guarded
    def set_tag(self, key: str, value: str) -> None:
        """Set one tag."""
        self._tag({key: value})

    def _tag(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._store.client.set_tag(self.id, key, value, synchronous=True)
            self._tags[key] = value
