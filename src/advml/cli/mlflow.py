"""The commands `sync`, `link`, `ui` and `server`, for MLflow. Each imports what it runs, so that `advml --help` answers at once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from advml.cli.options import PARAMS, Overrides, Params, store_of
from advml.core.messages import tell


def sync(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Rebuild missing or outdated MLflow runs from the study's files: after dvc pull, a hit in DVC's run cache, or an outage.

    Writes to the MLflow store only. Next: advml ui
    """
    from advml import tracking

    made = tracking.sync(store_of(params, overrides))
    print(f"{len(made)} runs rebuilt or brought up to date{': ' if made else ''}{', '.join(made)}\nnext: advml ui")


def link(
    port: Annotated[int, typer.Option(help="Port of the local server.")] = 5000, overrides: Overrides = None, params: Params = PARAMS
) -> None:
    """Print the address of this study's runs in the MLflow UI.

    Writes nothing. Next: advml ui
    """
    from advml.servers import mlflow_ui

    print(f"MLflow: {mlflow_ui.link(store_of(params, overrides), port=port)}", flush=True)


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the local server.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all networks, without a password.")] = "127.0.0.1",
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Serve MLflow with this study's runs until Ctrl-C, and print the link to their table.

    Writes nothing. Next: open the link in a browser
    """
    from advml.servers import mlflow_ui

    place, local = store_of(params, overrides), {"host": host, "port": port}
    command = mlflow_ui.command(place, **local)  # first, because opening the store silences MLflow's messages
    if command is not None:
        mlflow_ui.require_free(**local)
        if host not in mlflow_ui.LOOPBACK:
            tell(f"note: no password protects these runs: whoever reaches {host}:{port} can delete them; advml server asks for passwords")
    link = f"MLflow: {mlflow_ui.link(place, **local)}"
    if command is None:
        print(f"{link}\nthis is a server's address: open it in a browser")
    else:
        with contextlib.suppress(KeyboardInterrupt):
            mlflow_ui.serve(*command, **local, on_answer=lambda: print(f"{link}\nCtrl-C ends it", flush=True))


def server(
    backend: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_BACKEND_STORE_URI",
            help="Database of the runs, e.g. postgresql://user@host/name; give an address with a password only in the environment.",
            show_default="SQLite in the folder",
        ),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_ARTIFACTS_DESTINATION",
            help="Place of the artifacts: a folder or s3://bucket/path.",
            show_default="artifacts in the folder",
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder of the server's files: users, admin password, default database, artifacts.")] = Path(
        "mlflow-server"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on; any other than localhost needs a certificate.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
    tls_cert: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Certificate file, for https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="File with the certificate's private key.")] = None,
) -> None:
    """Run an MLflow server for a group until Ctrl-C: runs in PostgreSQL, artifacts through the server, users with passwords.

    The password of user admin is MLFLOW_AUTH_ADMIN_PASSWORD, or generated at the first start and kept in a file.
    Writes mlflow-server/. Next: set MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on each machine
    """
    from advml.servers import mlflow_server
    from advml.servers.mlflow_ui import serve

    ready = mlflow_server.prepare(
        folder=folder, backend=backend, artifacts=artifacts, host=host, port=port, tls_cert=tls_cert, tls_key=tls_key
    )
    with contextlib.suppress(KeyboardInterrupt):
        serve(
            ready.command,
            ready.environment,
            host=host,
            port=port,
            folder=ready.folder,
            tls=tls_cert is not None,
            on_answer=lambda: print("\n".join(ready.lines), flush=True),
        )
