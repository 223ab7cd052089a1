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
import time
from collections.abc import Iterator
from pathlib import Path

from advml.lines import tell

ADDRESS = "ADVML_WARM"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
MODULES = (
    "advml.cli",
    "advml.stages.train",
    "advml.stages.represent",
    "advml.stages.compare",
    "advml.stages.transfer",
    "advml.stages.report",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
)


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
        with _held():  # a Ctrl-C in a terminal also goes to the server, which may not ignore it yet
            process = subprocess.Popen([sys.executable, "-m", "advml.warm", address], cwd=root, env=environment, stdin=subprocess.PIPE)
        try:
            yield {ADDRESS: address}
        finally:
            process.stdin.close()  # the server leaves when nobody holds the other end any more
            process.wait()


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """Signals wait until the end; those to a process started within, until it lets them in."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


TAKEN, REFUSED = b"y", b"n"  # the server's first word; the second is the exit code


def forward(address: str, arguments: list[str]) -> int | None:
    """Have the server run `advml ARGUMENTS`; returns its exit code, or None if there is no server, or one with old sources."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        return None

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            connection.sendall(bytes([number]))

    obeyed = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # in the background, Ctrl-C is not
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "obeyed": obeyed}
    message = json.dumps(request).encode()
    with connection:
        with _held():  # a signal must not get in before the request
            before = {number: signal.signal(number, pass_on) for number in obeyed}
            socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
            connection.sendall(message)
        try:
            if connection.recv(1) == REFUSED:
                for number in obeyed:
                    signal.signal(number, before[number])
                return None
            answer = connection.recv(1)
        except ConnectionResetError:  # the server died before it got here
            answer = b""
    if not answer:
        tell("advml: killed from outside, perhaps for want of memory: run fewer jobs or lower batch_size")
    return answer[0] if answer else 1


def serve(address: str) -> None:
    """Import, then fork a child per connection until the parent process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to the end
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)  # clients that come during the imports wait in the queue
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    from advml.provenance import source_digest
    from advml.tracking.store import prepare

    prepare()  # before mlflow is imported: some of its settings are read then
    for module in MODULES:
        importlib.import_module(module)
    imported = source_digest()  # of the sources just imported, not of what they are edited to later
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for: they answer for themselves
    while True:
        connection, _ = listener.accept()
        # DVC records the sources as they are when a stage ends: one that was edited must not be run as it was before.
        is_current = source_digest.__wrapped__() == imported
        try:
            connection.sendall(TAKEN if is_current else REFUSED)
        except OSError:  # the client is dead by now; the stages of others must not follow it
            is_current = False
        if is_current and os.fork() == 0:
            listener.close()
            _work(connection)
        connection.close()


def _leave_with_parent() -> None:
    os.read(0, 1)
    os._exit(0)


def _work(connection: socket.socket) -> None:
    """In the child: become the client, run the command, answer with its exit code."""
    server_process = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    message = _read(connection, int.from_bytes(size, "big"))
    if not message:  # the client died before it said anything
        os._exit(1)
    request = json.loads(message)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["advml", *request["arguments"]]
    from advml.cli import guarded, main

    def command() -> None:
        threading.Thread(target=_obey, args=(connection,), daemon=True).start()  # signals may have waited for this
        threading.Thread(target=_leave_with_server, args=(server_process,), daemon=True).start()
        main()

    code = 1
    try:
        # The server ignores Ctrl-C, by its own will or because it was started in the background. What counts is the client.
        signal.signal(signal.SIGINT, signal.default_int_handler if signal.SIGINT in request["obeyed"] else signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as `main` does in a moment
        guarded(command)
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


def _leave_with_server(process: int) -> None:
    """The server ends with `advml repro`, also when that is killed outright: then nobody waits for this stage any more."""
    while os.getppid() == process:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := connection.recv(size - len(data))):
        data += part
    return data


if __name__ == "__main__":
    serve(sys.argv[1])
