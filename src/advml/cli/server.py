"""`advml server`: an MLflow server that a group shares. Nothing heavy is imported up here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer


def server(
    backend: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_BACKEND_STORE_URI",
            help="Database of the runs, e.g. postgresql://user@host/name; one with a password only in the environment.",
            show_default="SQLite in the folder",
        ),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_ARTIFACTS_DESTINATION",
            help="Where the server keeps artifacts: a folder or s3://bucket/path.",
            show_default="artifacts in the folder",
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder for users, the admin's password, and the rest.")] = Path("mlflow-server"),
    host: Annotated[str, typer.Option(help="Address to listen on; another than localhost needs a certificate.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
    tls_cert: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Certificate, for https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Private key of the certificate.")] = None,
) -> None:
    """Run an MLflow server for a group until Ctrl-C: runs in PostgreSQL, artifacts through the server, users with passwords.

    The password of user admin is that of MLFLOW_AUTH_ADMIN_PASSWORD, or made at the first start and kept in a file.
    Writes mlflow-server/. Next: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on each machine
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
