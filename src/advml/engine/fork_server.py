"""Imports once for many processes: `advml repro` forks stages, and `advml tune` trials, from a process that has imported torch.

Importing torch, timm and mlflow takes seconds, and dozens of stages need them. The server imports them once and listens on a Unix
socket, whose path is in ADVML_FORK_SERVER. `python -m advml ...` connects, hands over its arguments, environment and open files, and
ends with the exit code of the fork that does the work. Signals are passed on; if the client is killed, the fork is killed too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from advml.lines import tell
from advml.runtime import signals

ADDRESS = "ADVML_FORK_SERVER"
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
def server(root: Path, modules: Sequence[str] = MODULES) -> Iterator[dict[str, str]]:
    """Run a server while the context lasts; yields the environment variable by which stages and trials find it.

    Without fork or Unix sockets the mapping is empty, and every process imports for itself.

    Args:
        modules: what is imported before the first fork.
    """
    if not hasattr(os, "fork") or not hasattr(socket, "AF_UNIX"):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="advml-") as folder:
        address = os.path.join(folder, "socket")
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "advml.engine.fork_server", address, *modules]
        # In a session of its own, the terminal's Ctrl-C does not reach it; it ends when its standard input does.
        process = subprocess.Popen(command, cwd=root, env=environment, stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield {ADDRESS: address}
        finally:
            process.stdin.close()
            process.wait()


def forward(address: str, arguments: list[str]) -> int | None:
    """Have the server run `advml ARGUMENTS`; returns the exit code, or None if the server is gone or has imported older sources."""
    obeyed = [number for number in signals.ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # in the background, Ctrl-C is ignored
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "obeyed": obeyed}
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answers:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDING)  # until it is known which process gets them
        try:
            connection.connect(address)
            socket.send_fds(connection, [b"-"], [0, 1, 2])
            connection.sendall(json.dumps(request).encode() + b"\n")
            worker = int(answers.readline() or 0)
        except OSError:
            worker = 0
        for number in obeyed if worker else ():
            signal.signal(number, functools.partial(_pass_on, worker))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if not worker:
            return None
        with contextlib.suppress(OSError):
            if code := answers.readline():
                return int(code)
    tell("advml: process killed (out of memory?); run fewer jobs or lower batch_size")
    return 1


def _pass_on(process: int, number: int, _: object) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process, number)


def serve(address: str, modules: Sequence[str]) -> None:
    """Import `modules`, then fork a child for each connection until standard input is closed."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)  # clients that connect during the imports wait
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    from advml.provenance import source_digest
    from advml.tracking.store import prepare

    prepare()  # before the import of mlflow, which reads some of its settings then
    for module in modules:
        importlib.import_module(module)
    imported = source_digest()  # of the sources just imported, not of later edits
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    while True:
        connection, _ = listener.accept()
        # DVC records the sources as they are when a stage ends, so a stage must not run older ones: its client imports them itself.
        if source_digest.__wrapped__() == imported and os.fork() == 0:
            listener.close()
            _run(connection)
        connection.close()


def _run(connection: socket.socket) -> None:
    """In the child: take over the client's files, folder and environment, run the command, answer with its exit code."""
    requests, code, began = connection.makefile("rb"), 1, False
    try:
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
        message = requests.readline()
        if not message:  # the client died before it sent anything
            os._exit(1)
        request = json.loads(message)
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["advml", *request["arguments"]]
        import torch

        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in signals.ENDING:  # what counts is how the client was started
            signal.signal(number, signal.SIG_DFL if number in request["obeyed"] else signal.SIG_IGN)
        signals.obey()
        threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # torch has read the server's own
        if threads.isdecimal() and int(threads):
            torch.set_num_threads(int(threads))
        from advml.cli import guarded, main

        connection.sendall(b"%d\n" % os.getpid())
        began = True
        threading.Thread(
            target=lambda: (requests.read(1), os.kill(os.getpid(), signal.SIGKILL)), daemon=True
        ).start()  # the client has ended
        guarded(main)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # what an interpreter prints on its own
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            connection.sendall(b"%d\n" % (code & 0xFF if began else 0))  # 0 in place of a process id: the client does it itself
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
