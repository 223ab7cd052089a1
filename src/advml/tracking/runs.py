"""Opening, finding and ending runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from advml.errors import Failure
from advml.passwords import masked
from advml.tracking import server, ui
from advml.tracking import store as stores
from advml.tracking.run import Run, opened
from advml.tracking.start import DataInfo, Facts, get, start

if TYPE_CHECKING:
    from mlflow.entities import Run as Record

    from advml.config import Config

Kind = Literal["pretrain", "model", "comparison", "study", "evaluation", "search"]


def open_run(
    config: Config,
    *,
    root: Path,
    name: str,
    kind: Kind,
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    data: DataInfo | None = None,
    run_id: str | None = None,
) -> Run:
    """Start a run, or go on with one that was killed. Never raises: without a store the run does nothing.

    Args:
        config: its section `tracking` names the experiment and the store.
        root: the workspace, where params.yaml lies.
        name: the run's name, e.g. `CL-AT-s0`.
        kind: what the run is of.
        tags: scheme, phase or regime, seed; stored as `advml.<key>`.
        params: every parameter used, nested or flat.
        data: the data set trained on.
        run_id: the run to resume; where the store does not have it, a new one starts.
    """
    place, root, facts = stores.locate(config, root=root), Path(root).resolve(), Facts(name, kind, tags, params, data)
    run = opened(place, lambda store: Run(place, store, start(store, facts, root=root, run_id=run_id), root=root))
    if run is None:
        run = Run(place, None, None, root=root)
        run.id = run_id  # kept in the caller's state, so that a later resume finds its run again
    return run


def find_run(config: Config, *, root: Path, name: str | None = None, digest: str | None = None, kind: Kind | None = None) -> str | None:
    """The id of the newest run with this name, weights (sha256 of model.safetensors) and kind; None if there is none."""
    record = stores.attempt(stores.locate(config, root=root), lambda store: search(store, name=name, digest=digest, kind=kind))
    return record.info.run_id if record else None


def kill_run(config: Config, *, root: Path, run_id: str) -> None:
    """End a run that was left RUNNING by a process that is gone; runs that ended otherwise stay as they are."""

    def kill(store: stores.Store) -> None:
        record = get(store.client, run_id)
        if record is not None and record.info.status == "RUNNING":
            store.client.set_terminated(run_id, "KILLED")

    stores.attempt(stores.locate(config, root=root), kill)


def ui_link(config: Config, *, root: Path, host: str = "127.0.0.1", port: int = 5000) -> str:
    """The address of the experiment's table of runs in the UI: a local one on `host` and `port`, or the tracking server's.

    Raises:
        Failure: the store is a local one, and cannot be opened.
        UserError: the server does not take user or password.
    """
    place = stores.locate(config, root=root)
    base = masked(re.sub(r"//\S*@", "//", place.uri)).rstrip("/") if place.is_server else f"http://{server.shown_host(host)}:{port}"
    try:
        experiment = stores.connect(place).experiment
    except stores.Denied:
        raise
    except Exception as error:
        if not place.is_server:
            raise Failure(f"{stores.explain(place, error)}; mend the store or name another with -S tracking.uri=...") from error
        stores.give_up(place, error, then="the link is that of the server, not of the experiment")
        experiment = None
    return ui.experiment_link(base, experiment) if experiment else base


def ui_command(config: Config, *, root: Path, host: str = "127.0.0.1", port: int = 5000) -> tuple[list[str], dict[str, str]] | None:
    """Command and environment of a local UI on the store that `ui_link` links to; None where a server has one of its own."""
    place = stores.locate(config, root=root)
    if place.is_server:
        return None
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--host", host, "--port", str(port)]
    return command, {**os.environ, **server.environment(place.uri), **server.names(host, port)}


def search(store: stores.Store, **tags: str | None) -> Record | None:
    """The newest run that carries all of these `advml.` tags."""
    wanted = " and ".join(f"tags.`advml.{key}` = '{value}'" for key, value in tags.items() if value is not None)
    found = store.client.search_runs([store.experiment], wanted, max_results=1, order_by=["attributes.start_time DESC"])
    return found[0] if found else None
