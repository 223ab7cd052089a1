"""Imports once for many stages: under `advml repro` every stage is forked from one process that has imported torch.

Importing torch, timm and mlflow takes seconds, dozens of stages take it dozens of times. The server imports them
once and waits on a Unix socket; `python -m advml ...` sees its address in ADVML_WARM, hands over its arguments,
environment and file descriptors, and leaves with the exit code of the fork that does the work. Signals are passed
on, and if the client is killed, the fork is killed too: to DVC and to the user nothing differs but the time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ADDRESS = "ADVML_WARM"
MODULES = ("advml.stages.train", "advml.stages.report", "mlflow", "mlflow.store.tracking.sqlalchemy_store")


@contextlib.contextmanager
def server(root: Path) -> Iterator[dict[str, str]]:
    """Run a server while the context lasts; yields the environment variables that lead stages to it.

    Where there is no fork or no Unix socket the mapping is empty, and every stage imports for itself.
    """
    if not hasattr(os, "fork") or not hasattr(socket, "AF_UNIX"):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="advml-") as folder:
        address = os.path.join(folder, "socket")
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        process = subprocess.Popen([sys.executable, "-m", "advml.warm", address], cwd=root, env=environment, stdin=subprocess.PIPE)
        try:
            yield {ADDRESS: address}
        finally:
            process.stdin.close()  # the server leaves when nobody holds the other end any more
            process.wait()


def forward(address: str, arguments: list[str]) -> int | None:
    """Have the server run `advml ARGUMENTS`; returns its exit code, or None if there is no server."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        return None
    with connection:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(request)
        answer = connection.recv(1)
    if not answer:
        print("advml: killed from outside, perhaps for want of memory: run fewer jobs or lower batch_size", file=sys.stderr)
    return answer[0] if answer else 1


def serve(address: str) -> None:
    """Import, then fork a child per connection until the parent process is gone."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)  # clients that come during the imports wait in the queue
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    from advml.provenance import source_digest
    from advml.tracking.store import prepare

    prepare()  # before mlflow is imported: some of its settings are read then
    for module in MODULES:
        importlib.import_module(module)
    source_digest()  # of the sources just imported, not of what they are edited to later
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for: they answer for themselves
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _work(connection)
        connection.close()


def _leave_with_parent() -> None:
    os.read(0, 1)
    os._exit(0)


def _work(connection: socket.socket) -> None:
    """In the child: become the client, run the command, answer with its exit code."""
    size, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(_read(connection, int.from_bytes(size, "big")))
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["advml", *request["arguments"]]
    threading.Thread(target=_obey, args=(connection,), daemon=True).start()
    from advml.cli import main

    code = 1
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # what an interpreter would print on its own
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            connection.sendall(bytes([code & 0xFF]))
        os._exit(code)


def _obey(connection: socket.socket) -> None:
    """Raise the signals that the client got; when the client is gone, go."""
    while number := connection.recv(1):
        os.kill(os.getpid(), number[0])
    os.kill(os.getpid(), signal.SIGKILL)


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := connection.recv(size - len(data))):
        data += part
    return data


if __name__ == "__main__":
    serve(sys.argv[1])
