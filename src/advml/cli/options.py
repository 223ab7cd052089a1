"""Arguments and options that several commands share, and what `--params` and `--set` lead to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advml.core.messages import tell
from advml.core.paths import Workspace
from advml.recipes import REGIMES, SCHEMES, PhaseName, RegimeName, SchemeName

if TYPE_CHECKING:
    from advml.pipeline.context import Context

Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE", help="Override a parameter, e.g. -S threat_model.epsilon=8/255.")
]
Params = Annotated[Path, typer.Option("--params", help="The configuration file.")]
Scheme = Annotated[
    SchemeName,
    typer.Argument(help=f"{', '.join(f'{name} {scheme.described}' for name, scheme in SCHEMES.items())}.", show_default=False),
]
Regime = Annotated[
    RegimeName,
    typer.Argument(help="; ".join(f"{name}: {regime.described}" for name, regime in REGIMES.items()) + ".", show_default=False),
]
Phase = Annotated[PhaseName, typer.Argument(help="st: standard, at: adversarial.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of weights, batches, views and random starts.")]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Address of a Dask scheduler (tcp://host:8786), or a queue to submit jobs to: slurm, pbs, sge, lsf, oar, htcondor.",
        show_default="this machine",
    ),
]
PARAMS = Path("params.yaml")


def context_of(params: Path, overrides: list[str] | None) -> Context:
    """Read params.yaml, say how overrides were understood, and take the folder around it for the study's."""
    from advml.config import flatten, load

    configuration = load(params, overrides or [])
    values = flatten(configuration.model_dump(mode="json")) if overrides else {}
    for name in (override.partition("=")[0].strip(" +") for override in overrides or []):
        for key in (key for key in values if f"{key}.".startswith(f"{name}.")):  # of a section, everything in it
            tell(f"# {key} = {values[key]}")
    from advml.pipeline.context import Context

    return Context(configuration, Workspace(params.parent))
