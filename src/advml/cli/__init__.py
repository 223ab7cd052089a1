"""The command line: one command per DVC stage, and further commands.

Heavy modules are imported inside commands, so that `advml --help` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from advml import __version__
from advml.cli import mlflow, models, stages, study, tune
from advml.cli.errors import guarded
from advml.core import signals
from advml.core.errors import UserError
from advml.core.messages import OUTPUT

app = typer.Typer(
    help="Robustness and representations of supervised and contrastive networks. Start with: advml init digits",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Commands in the order in which `advml --help` lists them.
STAGES, EVERYDAY = "Stages of the pipeline (dvc repro runs them)", "Other commands"
COMMANDS = {
    STAGES: stages.COMMANDS,
    EVERYDAY: (
        *(study.init, study.doctor, study.estimate, models.train, models.show, models.attack, models.trust, study.preset, study.schema),
        *(mlflow.sync, mlflow.link, mlflow.ui, mlflow.server, study.repro, models.import_, models.export),
    ),
}
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(command.__name__.strip("_"), rich_help_panel=panel)(command)
app.add_typer(tune.app, name="tune", rich_help_panel=EVERYDAY)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"advml {__version__}")
        raise typer.Exit


QUIET, VERBOSE = ("-q", "--quiet"), ("-v", "--verbose")


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option(*QUIET, help="Print only results, warnings and errors. May follow any command.")] = False,
    verbose: Annotated[bool, typer.Option(*VERBOSE, help="Print the resolved settings, and tracebacks. May follow any command.")] = False,
) -> None:
    if quiet or verbose:
        os.environ[OUTPUT] = "quiet" if quiet else "verbose"


def _flags_first(arguments: list[str]) -> list[str]:
    """Move -q and -v to the front: `train CL AT -q` -> `-q train CL AT`. They are defined once, and accepted after every command."""
    flags = [argument for argument in arguments if argument in (*QUIET, *VERBOSE)]
    return [*flags, *(argument for argument in arguments if argument not in flags)]


def _check_torchrun() -> None:
    """Refuse a command other than training under torchrun, whose processes would all do the same work at once."""
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    if os.environ.get("WORLD_SIZE", "1") != "1" and command not in ("train", "pretrain", "finetune"):
        raise UserError("torchrun is for train, pretrain and finetune; start other commands without it")


def main() -> None:
    """Entry point of `advml`: prints foreseeable errors as one line; exit code 2 for the user's mistakes, 1 for failures."""
    signals.obey()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":  # old locales lack letters of class names
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if parent := os.environ.get("ADVML_PARENT"):  # core.processes.PARENT, not imported here because psutil is slow to import
        from advml.core.processes import end_with

        end_with(int(parent))
    if os.environ.get("RANK", "0") != "0":  # only the first of torchrun's processes prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end
    guarded(lambda: _check_torchrun() or app(args=_flags_first(sys.argv[1:]) or ["--help"], standalone_mode=False))
