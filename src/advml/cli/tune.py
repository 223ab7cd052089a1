"""The commands of `advml tune`, for searches. Heavy modules are imported inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advml.cli.options import PARAMS, ClusterOption, Overrides, Params, Phase, Regime, Scheme, Seed
from advml.cli.searching import run
from advml.core.messages import tell
from advml.core.paths import Workspace

app = typer.Typer(
    help="Search for stronger attacks and better training; section tune of params.yaml sets the search spaces. "
    "After an interruption, repeat the command: it goes on from there.",
    no_args_is_help=True,
)

Trials = Annotated[
    int | None,
    typer.Option(min=1, help="Total number of finished trials, including those of earlier commands.", show_default="as in params.yaml"),
]
Workers = Annotated[int, typer.Option("--workers", "-j", min=1, help="Number of trials at a time.")]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar="ADVML_STORAGE",
        help="Database of the searches: sqlite:///file.db, postgresql://user@host/name or mysql+pymysql://...",
        show_default="sqlite:///optuna.db",
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the search.", show_default="made from what is tuned")]
Replace = Annotated[bool, typer.Option("--replace", help="Delete an earlier search of this name that had other settings.")]
Pareto = Annotated[
    bool, typer.Option("--pareto", help="Find the Pareto front of robust and clean accuracy, without a floor on clean accuracy.")
]


@app.command()
def attack(
    model: Annotated[str, typer.Argument(help="A model's name (CL-AT-s0) or folder.", show_default=False)],
    trials: Trials = None,
    workers: Workers = 1,
    cluster: ClusterOption = None,
    storage: Storage = None,
    name: Name = None,
    autoattack: Annotated[bool, typer.Option(help="Also measure the model under AutoAttack on the test split, for comparison.")] = True,
    replace: Replace = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Find the strongest attack on a model within a fixed number of forward and backward passes.

    Searches on validation; the best attack and the default one are measured on test once.
    Writes reports/tune/attack-<MODEL>/. Next: advml tune apply attack-<MODEL>
    """
    from advml.config import load
    from advml.tuning.attack_search import AttackSearch

    search = AttackSearch.of(load(params, overrides or []), params.parent, model, autoattack=autoattack, name=name)
    run(search, trials=trials, workers=workers, cluster=cluster, storage=storage, replace=replace)


@app.command()
def finetune(
    scheme: Scheme,
    regime: Regime,
    seed: Seed = 0,
    trials: Trials = None,
    workers: Workers = 1,
    cluster: ClusterOption = None,
    storage: Storage = None,
    name: Name = None,
    pareto: Pareto = False,
    replace: Replace = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Find the fine-tuning parameters with the highest robust accuracy, given a floor on clean accuracy.

    Searches on validation, from the pretrained encoder. tune.finetune.clean_floor sets the floor.
    Writes reports/tune/finetune-<SCHEME>-<REGIME>-s<SEED>/. Next: advml tune apply finetune-<SCHEME>-<REGIME>-s<SEED>
    """
    _train("finetune", scheme, regime, seed, trials, workers, cluster, storage, name, pareto, replace, overrides, params)


@app.command()
def pretrain(
    scheme: Scheme,
    phase: Phase,
    seed: Seed = 0,
    trials: Trials = None,
    workers: Workers = 1,
    cluster: ClusterOption = None,
    storage: Storage = None,
    name: Name = None,
    pareto: Pareto = False,
    replace: Replace = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Find the pretraining parameters with the highest robust accuracy of a linear classifier, given a floor on clean accuracy.

    Searches on validation. tune.pretrain.clean_floor sets the floor.
    Writes reports/tune/pretrain-<SCHEME>-<PHASE>-s<SEED>/. Next: advml tune apply pretrain-<SCHEME>-<PHASE>-s<SEED>
    """
    _train("pretrain", scheme, phase, seed, trials, workers, cluster, storage, name, pareto, replace, overrides, params)


@app.command()
def apply(
    name: Annotated[str, typer.Argument(help="Name of the search: a folder of reports/tune/.", show_default=False)],
    trial: Annotated[
        int | None, typer.Option(min=0, help="Number of the trial to apply; needed after --pareto.", show_default="the best")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the difference without writing it.")] = False,
    params: Params = PARAMS,
) -> None:
    """Write a search's best values into params.yaml, keeping its comments, and print the difference.

    Writes params.yaml. Next: advml repro
    """
    from advml.config import load
    from advml.config.rewrite import merge
    from advml.core.io import write_atomically
    from advml.tuning.apply import proposal, warnings

    load(params)  # report existing mistakes of the file before changing it
    values = proposal(Workspace(params.parent), name, trial=trial)
    merged = merge(params, values)
    if not merged.changes:
        print(f"{params} has these values already")
        return
    print(merged.difference, end="")
    for line in warnings(merged.changes):
        print(line)
    if dry_run:
        print(f"nothing written; without --dry-run this goes into {params}")
        return
    write_atomically(params.resolve(), merged.text.encode())  # params.yaml may be a link to a file that several studies share
    print(f"wrote {params}\nnext: advml repro")


@app.command(hidden=True)
def worker() -> None:
    """Run trials as a process started by another command; see `advml.engine.process_task`."""
    from advml.engine.process_task import serve

    serve()


def _train(
    kind: Any,
    scheme: str,
    which: str,
    seed: int,
    trials: int | None,
    workers: int,
    cluster: str | None,
    storage: str | None,
    name: str | None,
    pareto: bool,
    replace: bool,
    overrides: list[str] | None,
    params: Path,
) -> None:
    from advml.config import load
    from advml.tuning.training_search import TrainingSearch

    search = TrainingSearch.of(load(params, overrides or []), params.parent, kind, scheme, which, seed=seed, pareto=pareto, name=name)
    if search.left_out:
        tell(f"note: keys of the space without effect here are left out: {', '.join(search.left_out)}")
    run(search, trials=trials, workers=workers, cluster=cluster, storage=storage, replace=replace)
