"""The store in a file: its address, its creation, and its artifacts after the project's folder has moved."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

LOCATIONS = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}


def uri(database: Path) -> str:
    """The address of a database; SQLAlchemy unquotes the path and takes what follows a question mark for options."""
    return "sqlite:///" + database.as_posix().replace("%", "%25").replace("?", "%3F")


def create(database: Path, *, artifacts: Path) -> None:
    """Make the tables in a file beside, then rename it: a kill in between never leaves half a schema. A link is followed."""
    database = database.resolve()
    database.parent.mkdir(parents=True, exist_ok=True)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    fresh = database.with_name(f"{database.name}.new")
    for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
        leftover.unlink(missing_ok=True)
    SqlAlchemyStore(uri(fresh), artifacts.parent.as_uri()).engine.dispose()
    fresh.replace(database)


def mend(database: Path, *, experiment: str, artifacts: Path) -> None:
    """Point the experiment's artifacts to where they lie now.

    MLflow stores absolute paths, so a project folder that was moved or copied would lose its artifacts, or
    write new ones into the original. Only paths that end in `mlruns/<experiment>` are ours to change.

    Raises:
        sqlite3.Error: if the file is no database or lacks MLflow's tables.
    """
    new = artifacts.as_uri()
    with closing(sqlite3.connect(database, timeout=5)) as connection, connection:
        query = "SELECT experiment_id, artifact_location FROM experiments WHERE name = ?"
        number, old = connection.execute(query, (experiment,)).fetchone() or (None, new)
        if old != new and old.endswith(f"/mlruns/{new.rpartition('/')[2]}") and old.startswith(("file:", "/")):
            for table, column in LOCATIONS.items():
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE experiment_id = ? AND substr({column}, 1, ?) = ?"
                connection.execute(change, (new, len(old) + 1, number, len(old), old))
