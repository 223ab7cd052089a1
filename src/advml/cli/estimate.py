"""The command `estimate`, which predicts the cost of a study."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from advml.cli.options import PARAMS, Overrides, Params, context_of
from advml.core.errors import UserError


def estimate(
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of stages at a time.")] = 2,
    machine: Annotated[
        str | None,
        typer.Option(
            help="Estimate for another GPU from its published speed, without trials: t4, v100, a100, rtx4090, h100 or h200.",
            show_default="this machine, by short trials",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every stage as JSON.")] = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Estimate the cost of the study in params.yaml by short trials: gradient steps, FLOPs, memory and hours.

    Writes nothing. Next: advml repro
    """
    context = context_of(params, overrides)
    from advml.pipeline import estimate as estimates

    if machine not in (None, *estimates.MACHINES):
        raise UserError(f"--machine {machine!r} is not known; choose from {', '.join(estimates.MACHINES)}, or leave it out for this one")
    found = estimates.estimate(context, jobs=jobs, machine=machine)
    if as_json:
        about = {**vars(found.total), "seconds": found.seconds, "jobs": jobs, "machine": machine or "this one"}
        return print(json.dumps({"total": about, "stages": {one.name: vars(one.cost) for one in found.stages}}, indent=1))
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Estimate for {machine or 'this machine'}; {len(found.stages)} stages, {jobs} at a time", title_justify="left")
    for header in ("stages", "number", "images x gradient steps", "TFLOP", "memory", "seconds each"):
        table.add_column(header, justify="left" if header == "stages" else "right")
    for kind in dict.fromkeys(stage.name.partition("@")[0] for stage in found.stages):
        costs = [stage.cost for stage in found.stages if stage.name.partition("@")[0] == kind]
        spread = sorted(cost.seconds for cost in costs)
        told = f"{spread[0]:.0f}" if len(costs) == 1 else f"{spread[0]:.0f} to {spread[-1]:.0f}"
        steps, flops = (sum(getattr(cost, key) for cost in costs) for key in ("gradient_steps", "flops"))
        memory = max(cost.memory for cost in costs)
        table.add_row(kind, str(len(costs)), f"{steps:,.0f}", f"{flops / 1e12:.3g}", f"{memory / 2**30:.1f} GiB" if memory else "-", told)
    Console(width=None).print(table)
    print(f"total: {found.seconds:.0f} s ({found.seconds / 3600:.2f} hours), {found.total.flops / 1e12:.3g} TFLOP\nnext: advml repro")
    return None
