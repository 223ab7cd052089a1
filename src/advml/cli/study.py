"""Commands on a study: init, doctor, preset, schema, estimate, repro. Each imports what it runs, so that `advml --help` answers at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from advml.cli.options import PARAMS, PRESETS, AsJson, ClusterOption, Overrides, Params, Quick, context_of
from advml.cli.printing import say, say_json, show_table
from advml.core.errors import UserError
from advml.core.messages import first_of, tell
from advml.core.paths import Workspace


def init(
    name: Annotated[str, typer.Argument(metavar="PRESET", help=f"Name of the preset: {PRESETS}.")] = "digits",
    folder: Annotated[Path, typer.Option(help="Folder of the new study.")] = Path(),
    quick: Quick = False,
    overrides: Overrides = None,
) -> None:
    """Create a study in an empty folder, or complete one that was cloned; existing files are not changed.

    Writes params.yaml, dvc.yaml, .dvcignore, .gitignore, README.md and a link to the package, and initialises git and DVC.
    Next: dvc repro
    """
    from advml.pipeline.new_study import new_study

    written = new_study(folder, name, quick=quick, overrides=overrides or ())
    if "params.yaml" not in written:
        tell(f"note: {folder / 'params.yaml'} exists and was kept; {name} is not its preset if it was written for another one")
    there = "" if folder == Path() else f"cd {folder} && "
    given = [override.partition("=")[0].strip() for override in overrides or ()]
    open_keys = [key for key in ("data.path", "data.image_size") if name == "folder" and key not in given and "params.yaml" in written]
    first = f"set {' and '.join(open_keys)} in params.yaml, then: " if open_keys else ""
    if ".git" in written:
        tell("note: results name the commit that they come from; before the first run: git add -A && git commit -m 'New study'")
    say(", ".join(written) or "nothing: all files exist", f"{first}{there}dvc repro")


def doctor(as_json: AsJson = False, params: Params = PARAMS) -> int | None:
    """Print installed versions, device, MLflow and DVC stores, and problems; exit code 1 if there are any.

    Writes nothing. Next: follow its last lines
    """
    from advml.pipeline.doctor import examine

    found = examine(params)
    if as_json:
        say_json(found)
    else:
        for section in ("installed", "device", "stores"):
            width = max(map(len, found[section]))
            print("\n".join([section, *(f"  {name:{width}}  {value}" for name, value in found[section].items())]))
        print("\n".join(f"! {line}" for line in found["wrong"]) or "no problems found")
    return 1 if found["wrong"] else None


def preset(
    name: Annotated[str, typer.Argument(help=f"Name of the preset: {PRESETS}.", show_default=False)],
    protocol: Annotated[str, typer.Option(help="Settings: corrected (this project's) or paper (the authors').")] = "corrected",
    quick: Quick = False,
    full: Annotated[bool, typer.Option("--full", help="Print all keys, including those left at their defaults.")] = False,
    overrides: Overrides = None,
) -> None:
    """Print the params.yaml of a preset.

    Writes to standard output. Next: advml preset cifar10 > params.yaml && dvc repro
    """
    from advml.config.presets import preset as text

    print(text(name, protocol=protocol, quick=quick, overrides=overrides or (), full=full), end="")


def schema() -> None:
    """Print the JSON schema of params.yaml, which lets editors explain and complete its keys.

    Writes to standard output. Next: advml schema > params.schema.json
    """
    from advml.config.writing import editor_schema

    print(editor_schema(), end="")


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
        told = " to ".join(dict.fromkeys(f"{seconds:.0f}" for seconds in (spread[0], spread[-1])))
        steps, flops = (sum(getattr(cost, key) for cost in costs) for key in ("gradient_steps", "flops"))
        memory = max(cost.memory for cost in costs)
        table.add_row(kind, str(len(costs)), f"{steps:,.0f}", f"{flops / 1e12:.3g}", f"{memory / 2**30:.1f} GiB" if memory else "-", told)
    Console(width=None).print(table)
    hours = f" ({found.seconds / 3600:.1f} hours)" if found.seconds >= 3600 else ""
    print(f"total: {found.seconds:.0f} s{hours}, {found.total.flops / 1e12:.3g} TFLOP\nnext: advml repro")
    return None


def repro(
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of stages at a time.")] = 2,
    cluster: ClusterOption = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Write seeds 0 to N - 1 into params.yaml first.", show_default="unchanged")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print which stages would run, and why; run none.")] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Run outdated stages like dvc repro, but several at a time; then print the table of results.

    Writes the files of the stages. Next: advml ui
    """
    if overrides or params.name != PARAMS.name:
        raise UserError(
            "advml repro takes no -S, because DVC reads params.yaml: edit that file, or try a variant with: dvc exp run -S key=value"
        )
    if as_json and not dry_run:
        raise UserError("--json goes with --dry-run; the results of a run are in reports/summary.csv and reports/*/metrics.json")
    from advml.config import load
    from advml.config.store import locate
    from advml.pipeline.repro import check_starting_points, reasons
    from advml.pipeline.repro import repro as run
    from advml.tracking import warn_if_unusable

    if seeds:
        write_seeds(params, seeds)
    configuration = load(params)  # report mistakes in the file before any stage runs
    check_starting_points(configuration, Workspace(params.parent))
    if dry_run:
        return _would_run(reasons(params.parent), as_json=as_json)
    warn_if_unusable(locate(configuration.tracking, root=params.parent))

    started = time.monotonic()
    ran = run(
        params.parent, jobs=jobs, cluster=cluster, options=configuration.cluster, reserve=configuration.runtime.device in ("auto", "cuda")
    )
    print(f"{len(ran)} stages ran in {time.monotonic() - started:.0f} s" if ran else "everything is up to date")
    rows = show_table(configuration, Workspace(params.parent))
    print("next: open reports/report.html     the whole study on one page")
    print("      advml ui                     compare the runs in MLflow")
    if rows:
        print(f"      advml show {rows[-1]['model']:18}data, settings and measurements of a model")
    print("      dvc plots show               training curves and the result chart as a page")


def write_seeds(params: Path, count: int) -> None:
    """Set `seeds` in params.yaml, keeping its comments, and print the difference."""
    from advml.config import load
    from advml.config.rewrite import merge
    from advml.core.io import write_atomically

    load(params)
    merged = merge(params, {"seeds": list(range(count))})
    if merged.changes:
        print(merged.difference, end="")
        write_atomically(params.resolve(), merged.text.encode())  # params.yaml may be a link to a file that several studies share


def _would_run(found: dict[str, list[str]], *, as_json: bool) -> None:
    if as_json:
        return say_json(found)
    width = max(map(len, found), default=0)
    for name, why in found.items():
        print(f"{name:{width}}  {first_of([first_of(one.split(', '), 2) for one in why], 2, between='; ')}")
    print(f"{len(found)} stages would run\nnext: advml repro" if found else "everything is up to date")
