"""`advml tune`: the command line of the searches. Nothing heavy is imported up here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advml.config import PhaseName, RegimeName, SchemeName, load
from advml.errors import UserError
from advml.paths import Workspace

if TYPE_CHECKING:
    from advml.config import Config
    from advml.tuning.command import Outcome
    from advml.tuning.searches import AttackSearch, TrainingSearch

app = typer.Typer(
    help="Search for stronger attacks and better training. The same command goes on where an earlier one was stopped or killed.",
    no_args_is_help=True,
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE", help="Override a parameter, e.g. -S tune.finetune.clean_floor=0.9.")
]
Params = Annotated[Path, typer.Option("--params", help="The configuration file; the searches stand in its section `tune`.")]
Trials = Annotated[
    int | None,
    typer.Option(min=1, help="Finished trials in all, of all workers and repeated commands.", show_default="as in params.yaml"),
]
Workers = Annotated[int, typer.Option("--workers", "-j", min=1, help="Processes on this machine.")]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar="ADVML_STORAGE",
        help="Database of the studies, for several machines: postgresql://user@host/name or mysql+pymysql://...",
        show_default="sqlite:///optuna.db",
    ),
]
Name = Annotated[str | None, typer.Option(help="Of the study.", show_default="says what is tuned")]
Replace = Annotated[bool, typer.Option("--replace", help="Throw away a study of this name that searched something else.")]
Scheme = Annotated[
    SchemeName, typer.Argument(help="SL supervised, CL contrastive (SimCLR), SCL supervised contrastive (SupCon).", show_default=False)
]
Pareto = Annotated[bool, typer.Option("--pareto", help="Find the front of robust and clean accuracy, instead of keeping a floor.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the model.")]
PARAMS = Path("params.yaml")


@app.command()
def attack(
    model: Annotated[str, typer.Argument(help="A model's name (CL-AT-s0) or folder.", show_default=False)],
    trials: Trials = None,
    workers: Workers = 1,
    storage: Storage = None,
    name: Name = None,
    autoattack: Annotated[bool, typer.Option("--autoattack", help="Measure the winner on test beside AutoAttack, too.")] = False,
    replace: Replace = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Find the attack that breaks a model most, within a fixed number of forward and backward passes.

    Searches on validation; the winner is measured on test once, beside the default attack.
    Writes reports/tune/attack-<MODEL>/. Next: advml tune apply attack-<MODEL>
    """
    configuration = load(params, overrides or [])
    from advml.tuning.searches import AttackSearch

    search = AttackSearch.of(_threads(configuration, workers), params.parent, model, autoattack=autoattack, name=name)
    spec = configuration.tune.attack
    _run(search, configuration, params, storage=storage, trials=trials or spec.trials, workers=workers, seed=spec.seed, replace=replace)


@app.command()
def finetune(
    scheme: Scheme,
    regime: Annotated[RegimeName, typer.Argument(help="Partial-AT and Full-AT fine-tune under attack.", show_default=False)],
    seed: Seed = 0,
    trials: Trials = None,
    workers: Workers = 1,
    storage: Storage = None,
    name: Name = None,
    pareto: Pareto = False,
    replace: Replace = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Find the fine-tuning that is most robust without giving up clean accuracy.

    Searches on validation, from the pretrained encoder; tune.finetune.clean_floor is kept.
    Writes reports/tune/finetune-<SCHEME>-<REGIME>-s<SEED>/. Next: advml tune apply finetune-<SCHEME>-<REGIME>-s<SEED>
    """
    _train("finetune", scheme, regime, seed, trials, workers, storage, name, pareto, replace, overrides, params)


@app.command()
def pretrain(
    scheme: Scheme,
    phase: Annotated[PhaseName, typer.Argument(help="st: standard, at: adversarial.", show_default=False)],
    seed: Seed = 0,
    trials: Trials = None,
    workers: Workers = 1,
    storage: Storage = None,
    name: Name = None,
    pareto: Pareto = False,
    replace: Replace = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Find the pretraining whose encoder, under a linear classifier, is most robust without giving up clean accuracy.

    Searches on validation; tune.pretrain.clean_floor is kept.
    Writes reports/tune/pretrain-<SCHEME>-<PHASE>-s<SEED>/. Next: advml tune apply pretrain-<SCHEME>-<PHASE>-s<SEED>
    """
    _train("pretrain", scheme, phase, seed, trials, workers, storage, name, pareto, replace, overrides, params)


@app.command()
def apply(
    name: Annotated[str, typer.Argument(help="Of the study: a folder of reports/tune/.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the difference, change nothing.")] = False,
    params: Params = PARAMS,
) -> None:
    """Put a study's best values into params.yaml, keeping its comments, and print the difference.

    Writes params.yaml. Next: advml repro
    """
    from advml.tuning.apply import merge, proposal

    load(params)  # what is wrong with the file now must not look like the proposal's fault
    text, difference = merge(params, proposal(Workspace(params.parent), name))
    if not difference:
        print(f"{params} has these values already")
        return
    print(difference, end="")
    if dry_run:
        print(f"nothing written; without --dry-run this goes into {params}")
        return
    temporary = params.with_name(f"{params.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, params)
    print(f"wrote {params}\nnext: advml repro")


def _train(
    kind: Any,
    scheme: str,
    which: str,
    seed: int,
    trials: int | None,
    workers: int,
    storage: str | None,
    name: str | None,
    pareto: bool,
    replace: bool,
    overrides: list[str] | None,
    params: Path,
) -> None:
    configuration = load(params, overrides or [])
    from advml.tuning.searches import TrainingSearch

    search = TrainingSearch.of(_threads(configuration, workers), params.parent, kind, scheme, which, seed=seed, pareto=pareto, name=name)
    if search.left_out:
        print(f"left out, without effect here: {', '.join(search.left_out)}", file=sys.stderr, flush=True)
    spec = search.spec
    _run(search, configuration, params, storage=storage, trials=trials or spec.trials, workers=workers, seed=spec.seed, replace=replace)


def _threads(configuration: Config, workers: int) -> Config:
    """Workers share the cores out among themselves, where params.yaml gives a process all of them."""
    from advml.config import changed

    if configuration.runtime.threads or workers == 1:
        return configuration
    return changed(configuration, {"runtime.threads": max(1, (os.cpu_count() or 1) // workers)})


def _run(
    search: AttackSearch | TrainingSearch,
    configuration: Config,
    params: Path,
    *,
    storage: str | None,
    trials: int,
    workers: int,
    seed: int,
    replace: bool,
) -> None:
    from advml.tuning.command import tune

    if missed := search.missed():
        told = ", ".join(f"{key} = {value}" for key, value in missed.items())
        print(f"the space does not reach params.yaml's own {told}: there will be no default to compare with", file=sys.stderr, flush=True)
    outcome = tune(
        search,
        configuration,
        Workspace(params.parent),
        storage=storage,
        trials=trials,
        workers=workers,
        seed=seed,
        replace=replace,
    )
    print("\n".join(_told(outcome, search.metrics)))


def _told(outcome: Outcome, metrics: tuple[str, ...]) -> list[str]:
    """What the command prints in the end."""
    from advml.tuning.board import show

    if outcome.best is None:
        raise UserError(
            f"no trial of {outcome.name} keeps the floor of clean accuracy; lower tune.{outcome.name.split('-')[0]}.clean_floor"
        )
    lines = [f"{outcome.name}: {outcome.finished} trials; the best is trial {outcome.best.number}: {show(outcome.best.params)}"]
    for who, trial in (("best", outcome.best), ("default", outcome.default)):
        if trial is not None:
            lines.append(f"  {who}: " + ", ".join(f"{name} {value:.4g}" for name, value in zip(metrics, trial.values, strict=True)))
    for split in ("validation", "test"):
        for who, found in (outcome.confirmed or {}).get(split, {}).items():
            lines.append(f"  {split}, {who}: {_figure(found)}")
    for who, found in (outcome.confirmed or {}).get("confirmed", {}).items():
        if isinstance(found, dict):
            lines.append(f"  further seeds, {who}: " + ", ".join(f"{name} {_spread(one)}" for name, one in found.items()))
    return [*lines, f"wrote {outcome.folder}: {', '.join(path.name for path in outcome.files)}", f"next: advml tune apply {outcome.name}"]


def _figure(found: dict[str, Any]) -> str:
    if "accuracy" in found:
        return f"{100 * found['accuracy']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f}, n = {found['n']})"
    winner, default = found["broken_by_winner_only"], found["broken_by_default_only"]
    return f"{winner} images broken by the winner only, {default} by the default only, p = {found['p']:.2g}"


def _spread(one: dict[str, Any]) -> str:
    return f"{one['mean']:.4g}" + (f" (sd {one['sd']:.2g})" if "sd" in one else "")
