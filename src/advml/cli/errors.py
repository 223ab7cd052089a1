"""Print foreseeable errors as one line; exit code 2 for the user's mistakes, 1 for failures."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import typer

from advml.core.errors import Failure, UserError
from advml.core.messages import is_verbose, tell
from advml.core.passwords import masked
from advml.core.signals import ENDING

OF_THE_DISK = (errno.EIO, errno.EFBIG, errno.EROFS)  # disk errors that may lack a file name
LOST = "the connection to another process of this training was lost; the same command continues from the last finished epoch"
WAIT = 5.0  # seconds in which torchrun ends the other processes of a training after an error of one


def guarded(command: Callable[[], Any]) -> None:
    """Run `command`, and print foreseeable errors as one line on stderr."""
    interrupted = "interrupted; the same command goes on from what was finished"
    try:
        code = command()
    except typer.TyperException as error:  # a wrong argument or option; the message of pydantic has a prefix of two words
        _fail(error.format_message().replace("Value error, ", ""), code=error.exit_code)
    except UserError as error:
        _fail(str(error), code=2)
    except Failure as error:
        _fail(str(error), code=1)
    except KeyboardInterrupt:
        _fail(interrupted, code=130)
    except MemoryError:
        _fail("out of memory; lower batch_size in params.yaml", code=1)
    except Exception as error:
        if (line := _known(error)) is None:
            sys.excepthook = print_fault  # here, because typer replaces it
            raise
        if line == LOST:  # torchrun may know which process has ended
            _wait_to_be_ended()
        _fail(line, code=1)
    if code == 130:  # typer turns Ctrl-C into this exit code
        _fail(interrupted, code=130)
    sys.exit(code if isinstance(code, int) else 0)


def print_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unforeseen error without passwords; `guarded` replaces `sys.excepthook` by it."""
    if _is_first_to_fail():
        _print_trace(kind, error, trace)
    else:
        _wait_to_be_ended()


def _print_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(masked("".join(traceback.format_exception(kind, error, trace))))


def _known(error: Exception) -> str | None:
    """Message for an error of the machine (memory, disk), which libraries raise as different types; None: another error."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return "the disk is full; free some space and run the same command again: it goes on from what was finished"
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return "out of memory; lower batch_size in params.yaml (the phase's section, or evaluate) or use a smaller model.backbone"
    if isinstance(error, OSError) and (error.filename or error.errno in OF_THE_DISK):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or text}; fix this and repeat the command, which goes on from here"
    if "gloo/transport" in text or type(error).__name__ == "DistBackendError":  # of torch.distributed
        return LOST
    if type(error).__name__ == "SafetensorError":  # an I/O error in the Rust code of safetensors
        return f"tensors cannot be read or written: {text}"
    return None


def _is_first_to_fail() -> bool:
    """Whether no other process of one training has failed on this machine; torchrun gives them folders side by side."""
    try:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1].joinpath("failed").touch(exist_ok=False)
    except (KeyError, IndexError):  # not started by torchrun, or without folders
        return True
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def _wait_to_be_ended() -> None:
    """Wait until torchrun ends this process, because another one has failed; of processes that have ended it may return any exit code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(WAIT)


def _fail(line: str, *, code: int) -> NoReturn:
    if _is_first_to_fail():
        if is_verbose() and (error := sys.exc_info()[1]):
            _print_trace(type(error), error, error.__traceback__)
        tell(f"advml: {line}")
    elif code != 130:  # torchrun waits for interrupted processes
        _wait_to_be_ended()
    sys.exit(code)
