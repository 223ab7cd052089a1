"""Arguments and options shared by several commands, and the context made from `--params` and `--set`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from advml.core.errors import UserError
from advml.core.messages import is_verbose, tell
from advml.core.paths import Workspace
from advml.recipes import REGIMES, SCHEMES, PhaseName, RegimeName, SchemeName

if TYPE_CHECKING:
    from advml.config.store import Place
    from advml.pipeline.context import Context

Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE", help="Override a parameter, e.g. -S threat_model.epsilon=8/255.")
]
Params = Annotated[Path, typer.Option("--params", help="The configuration file.")]


def one_of(names: Any) -> Callable[[str], str]:
    """Parser of an argument that names one value of a `Literal`, in upper or lower case."""
    known = {name.lower(): name for name in get_args(names)}
    also = {scheme.known_as.lower(): name for name, scheme in SCHEMES.items() if scheme.known_as and name in known.values()}

    def parse(text: str) -> str:
        if text.lower() in known:
            return known[text.lower()]
        near = difflib.get_close_matches(text.lower(), [*also, *known], n=1)
        meant = f"; did you mean {(also | known)[near[0]]}?" if near else "."
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, known.values()))}{meant}")

    return parse


def choice(names: Any, help: str) -> Any:
    """Argument that names one value of a `Literal`, with shell completion."""
    values = list(get_args(names))
    return typer.Argument(parser=one_of(names), autocompletion=lambda: values, help=help, show_default=False)


Scheme = Annotated[str, choice(SchemeName, f"{', '.join(f'{name} {scheme.described}' for name, scheme in SCHEMES.items())}.")]
Regime = Annotated[str, choice(RegimeName, "; ".join(f"{name}: {regime.described}" for name, regime in REGIMES.items()) + ".")]
Phase = Annotated[str, choice(PhaseName, "st: standard, at: adversarial.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of weights, batches, views and random starts.")]
Processes = Annotated[
    int, typer.Option("--processes", min=1, help="Processes that share every batch, each on a GPU or on its part of the cores.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Address of a Dask scheduler (tcp://host:8786), or a queue to submit jobs to: slurm, pbs, sge, lsf, oar, htcondor.",
        show_default="this machine",
    ),
]
PARAMS = Path("params.yaml")
PRESETS = "digits, smoke, semi_supervised, cifar10, cifar100 or folder"
Quick = Annotated[bool, typer.Option("--quick", help="The digits study in a third of its time, by free adversarial training.")]
StudyParams = Annotated[
    Path, typer.Option("--params", help="Configuration file of the study; only its folder is used, to find models and reports.")
]

# Options of `evaluate` and `represent`, which take a model of the study's grid or one from elsewhere.
OptionalRegime = Annotated[str | None, choice(RegimeName, "Regime of the scheme's model.")]
OptionalSeed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the scheme's model.", show_default="0")]


def target_argument(others: str) -> Any:
    """First argument of a command: a scheme, which a regime follows, or a model described by `others`."""
    text = f"A scheme with a regime: {', '.join(SCHEMES)}. Or {others}."
    return typer.Argument(metavar="SCHEME|MODEL", help=text, show_default=False)


def mean_option(default: str, *, more: str = "") -> Any:
    """Option `--mean`, which accepts the names of `advml.models.normalization.KNOWN` and `more`."""
    text = (
        "Mean of the normalisation that the model expects: one number or one per channel, or a name for mean and std: none, imagenet, "
        f"half (-1 to 1), clip, cifar10, cifar100, mnist, levels (0 to 255){more}."
    )
    return typer.Option("--mean", help=text, show_default=default)


Std = Annotated[
    str | None, typer.Option("--std", help="Standard deviation, given in the same ways.", show_default="of the name that --mean gives")
]


def context_of(params: Path, overrides: list[str] | None) -> Context:
    """Read params.yaml, print the overridden values, and return the context of the study in its folder."""
    from advml.config import flatten, load

    configuration = load(params, overrides or [])
    values = flatten(configuration.model_dump(mode="json")) if overrides or is_verbose() else {}
    for name in [""] if is_verbose() else [override.partition("=")[0].strip(" +") for override in overrides or []]:
        for key in (key for key in values if not name or f"{key}.".startswith(f"{name}.")):  # a section prints all its keys
            tell(f"# {key} = {values[key]}")
    from advml.pipeline.context import Context

    return Context(configuration, Workspace(params.parent))


def start(processes: int) -> None:
    """Start this command again in several processes, and end with them, unless it is one of them already.

    Raises:
        UserError: torchrun has started another number of processes.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if processes not in (1, started):
        if started > 1:
            raise UserError(f"--processes {processes}, but torchrun has started {started}; leave --processes out")
        from advml.core import ranks

        ranks.start(processes)


def store_of(params: Path, overrides: list[str] | None) -> Place:
    """MLflow store of the study in the folder of params.yaml."""
    from advml.config import load
    from advml.config.store import locate

    return locate(load(params, overrides or []).tracking, root=params.parent)
