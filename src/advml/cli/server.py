"""The command `server`: an MLflow server that a group shares. Heavy modules are imported inside the command."""

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
