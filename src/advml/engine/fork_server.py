"""Fork server: `advml repro` forks stages, and `advml tune` trials, from one process that has imported torch.

Importing torch, timm and mlflow takes seconds, and dozens of stages need them. The server imports them once, and listens on a Unix
socket whose path is in ADVML_FORK_SERVER. `python -m advml ...` connects, sends its arguments, environment and open files, and exits
with the code of the fork that runs the command. It forwards signals; if it is killed, the fork is killed too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from advml.core import signals
from advml.core.messages import tell
from advml.core.provenance import source_digest

ADDRESS = "ADVML_FORK_SERVER"
STAGES = ("train", "represent", "compare", "transfer", "report")
MODULES = ("advml.cli", *(f"advml.pipeline.stages.{stage}" for stage in STAGES), "mlflow", "mlflow.store.tracking.sqlalchemy_store")


@contextlib.contextmanager
def server(root: Path, modules: Sequence[str] = MODULES) -> Iterator[dict[str, str]]:
    """Context manager that runs a server with `modules` imported; yields the environment variable by which processes find it."""
    with tempfile.TemporaryDirectory(prefix="advml-") as folder:
        command = [sys.executable, "-m", "advml.engine.fork_server", address := os.path.join(folder, "socket"), *modules]
        # In a session of its own, so that the terminal's Ctrl-C does not reach it; it ends when its standard input is closed.
        with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, start_new_session=True):
            yield {ADDRESS: address}


def forward(address: str, arguments: list[str]) -> int | None:
    """Let the server run `advml ARGUMENTS`; returns the exit code, or None if the server is gone or has imported other sources.

    DVC records the digests of sources when a stage ends, so a stage must not run older ones.
    """
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answers:
        try:
            connection.connect(address)
            socket.send_fds(connection, [b"-"], [0, 1, 2])
            connection.sendall(json.dumps([source_digest(), arguments, dict(os.environ), os.getcwd()]).encode() + b"\n")
            if not answers.readline():
                return None
        except OSError:
            return None
        for number in signals.ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # commands in the background ignore Ctrl-C
                signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        with contextlib.suppress(OSError):
            if code := answers.readline():
                return int(code)
    tell("advml: process killed (out of memory?); run fewer jobs or lower batch_size")
    return 1


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Forks a child for each connection; clients that connect during the imports wait."""


class Command(socketserver.StreamRequestHandler):
    """Handler in the forked child, which runs a client's command."""

    def handle(self) -> None:
        """Adopt the client's files, folder and environment, run the command, and send its exit code."""
        self.server.socket.close()
        files = socket.recv_fds(self.connection, 1, 3)[1]
        if not (request := self.rfile.readline()):  # the client was killed
            return
        sources, arguments, environment, folder = json.loads(request)
        if sources != source_digest():
            return
        for target, file in enumerate(files):
            os.dup2(file, target)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["advml", *arguments]
        from advml.cli import main

        torch, threads = sys.modules.get("torch"), environment.get("OMP_NUM_THREADS", "").partition(",")[0]
        if torch and threads:  # torch has read the server's setting
            torch.set_num_threads(int(threads))
        for number in signals.ENDING:  # the server may ignore other signals than its client
            signal.signal(number, signal.SIG_DFL)
        self.wfile.write(b"begun\n")
        threading.Thread(target=self._obey, daemon=True).start()
        code = 1
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:  # print the traceback, as an interpreter would
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        self.wfile.write(b"%d\n" % code)
        os._exit(code)

    def _obey(self) -> None:
        """Raise the signals that the client forwards; end when the client ends."""
        with contextlib.suppress(ConnectionError):
            while number := self.rfile.read(1):
                os.kill(os.getpid(), number[0])
        os.kill(os.getpid(), signal.SIGKILL)


def serve(address: str, *modules: str) -> None:
    """Import `modules`, then run commands until standard input is closed."""
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    waiting = Server(address, Command)
    from advml.tracking.store import prepare

    prepare()  # before importing mlflow, which reads some of its settings then
    for module in modules:
        importlib.import_module(module)
    source_digest()  # cached now, so that it describes the imported sources, not later edits
    waiting.serve_forever()


if __name__ == "__main__":
    serve(*sys.argv[1:])
