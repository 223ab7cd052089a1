"""Commands that are no stages of the pipeline. Each imports what it runs, so that `advml --help` answers at once."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from advml.cli.evaluate import tell_result
from advml.cli.options import PARAMS, PRESETS, AsJson, ClusterOption, Overrides, Params, Place, Quick, Regime, Scheme, Seed, context_of
from advml.cli.printing import say, say_json, show_table
from advml.cli.server import server
from advml.core.errors import UserError
from advml.core.messages import tell
from advml.core.paths import Workspace, model_name


def train(
    scheme: Scheme,
    regime: Regime,
    seed: Seed = 0,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share every batch, each on a GPU or on its part of the cores.")] = 1,
    as_json: AsJson = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Run prepare, pretrain, finetune and evaluate for one model, skipping what is up to date.

    Writes the files of these stages. Next: advml show MODEL
    """
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        from advml.core import ranks

        ranks.start(processes)
    context = context_of(params, overrides)
    from advml.pipeline.stages import train as everything
    from advml.tracking import warn_if_unusable

    warn_if_unusable(context.tracking)
    metrics = everything.run(context, scheme=scheme, regime=regime, seed=seed)
    name = model_name(scheme, regime, seed)
    tell_result(name, metrics, f"{context.workspace.model(name)}, {context.workspace.report(name)}", context, as_json=as_json)


def show(
    model: Annotated[
        str,
        typer.Argument(help="A model's name (CL-Full-AT-s0) or folder, or the --name that evaluate was given.", show_default=False),
    ],
    params: Place = PARAMS,
    as_json: AsJson = False,
) -> None:
    """Print a model's record: data, settings, training and measurements.

    Writes nothing. Next: advml attack IMAGE --model MODEL
    """
    from advml.report.show import record_of, records_of

    workspace = Workspace(params.parent)
    if as_json:
        return say_json(records_of(workspace, model))
    print(record_of(workspace, model))
    given = model in workspace.evaluations_of_given()
    print("next: advml report     (the page shows it beside the study's models)" if given else f"next: advml attack IMAGE --model {model}")


def attack(
    image: Annotated[Path, typer.Argument(help="Any image file.", show_default=False)],
    model: Annotated[str, typer.Option(help="A model's name (CL-Full-AT-s0) or folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("attack.png"),
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Attack one image and draw the result: original, perturbation, adversarial image, predictions.

    Writes attack.png. Next: try the same image with a model of another regime
    """
    context = context_of(params, overrides)
    from advml.pipeline.attack_demo import attack_picture

    told = attack_picture(context, image, model=model, out=out)
    print(told)
    say(str(out), f"advml show {model}")


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


def sync(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Rebuild missing or outdated MLflow runs from the study's files: after dvc pull, a hit in DVC's run cache, or an outage.

    Writes to the MLflow store only. Next: make ui
    """
    from advml import tracking
    from advml.config import load
    from advml.config.store import locate

    made = tracking.sync(locate(load(params, overrides or []).tracking, root=params.parent))
    print(f"{len(made)} runs rebuilt or brought up to date{': ' if made else ''}{', '.join(made)}\nnext: make ui")


def link(
    port: Annotated[int, typer.Option(help="Port of the local server.")] = 5000, overrides: Overrides = None, params: Params = PARAMS
) -> None:
    """Print the address of this study's runs in the MLflow UI.

    Writes nothing. Next: make ui
    """
    from advml.config import load
    from advml.config.store import locate
    from advml.servers import mlflow_ui

    place = locate(load(params, overrides or []).tracking, root=params.parent)
    print(f"MLflow: {mlflow_ui.link(place, port=port)}", flush=True)


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the local server.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all networks, without a password.")] = "127.0.0.1",
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Serve MLflow with this study's runs until Ctrl-C, and print the link to their table.

    Writes nothing. Next: open the link in a browser
    """
    from advml.config import load
    from advml.config.store import locate
    from advml.servers import mlflow_ui

    place, local = locate(load(params, overrides or []).tracking, root=params.parent), {"host": host, "port": port}
    command = mlflow_ui.command(place, **local)  # first, because opening the store silences MLflow's messages
    if command is not None:
        mlflow_ui.require_free(**local)
        if host not in mlflow_ui.LOOPBACK:
            tell(f"note: no password protects these runs: whoever reaches {host}:{port} can delete them; advml server asks for passwords")
    link = f"MLflow: {mlflow_ui.link(place, **local)}"
    if command is None:
        print(f"{link}\nthis is a server's address: open it in a browser")
    else:
        with contextlib.suppress(KeyboardInterrupt):
            mlflow_ui.serve(*command, **local, on_answer=lambda: print(link, flush=True))


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

    Writes the files of the stages. Next: make ui
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
    print("      make ui                      compare the runs in MLflow")
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
        print(f"{name:{width}}  {'; '.join(why)}")
    print(f"{len(found)} stages would run\nnext: advml repro" if found else "everything is up to date")


def trust(
    epochs: Annotated[int, typer.Option(help="Epochs of the longest training.")] = 8,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 2,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Score the measures of similarity: train small networks whose order of similarity is known, and test which measures find it.

    Writes records/trust/measures.json, which the report shows. Next: advml report
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import trust as stage
    from advml.similarity.trust import table

    for line in table(stage.run(context, epochs=epochs, seeds=seeds)["scores"]):
        print("  ".join(f"{cell:>16}" for cell in line))
    say(str(context.workspace.record("trust", "measures")), "advml report")


# In the order in which `advml --help` lists them.
COMMANDS = (train, show, attack, trust, preset, schema, sync, link, ui, server, repro)
