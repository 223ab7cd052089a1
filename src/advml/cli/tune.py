"""The commands of `advml tune`: run a search and print its result. Heavy modules are imported inside commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from advml.cli.options import PARAMS, ClusterOption, Overrides, Params, Phase, Regime, Scheme, Seed
from advml.core.errors import Failure, UserError
from advml.core.messages import tell
from advml.core.paths import Workspace

if TYPE_CHECKING:
    from advml.tuning.command import Outcome
    from advml.tuning.search import Search

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
    from advml.config import load
    from advml.tuning.training_search import TrainingSearch

    what = ("finetune", scheme, regime)
    search = TrainingSearch.of(load(params, overrides or []), params.parent, *what, seed=seed, pareto=pareto, name=name)
    run(search, trials=trials, workers=workers, cluster=cluster, storage=storage, replace=replace)


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
    from advml.config import load
    from advml.tuning.training_search import TrainingSearch

    what = ("pretrain", scheme, phase)
    search = TrainingSearch.of(load(params, overrides or []), params.parent, *what, seed=seed, pareto=pareto, name=name)
    run(search, trials=trials, workers=workers, cluster=cluster, storage=storage, replace=replace)


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


def run(search: Search, *, trials: int | None, workers: int, cluster: str | None, storage: str | None, replace: bool) -> None:
    """Search until `trials` trials have finished (None: the number in params.yaml), then print the result."""
    from advml.cli.live_table import LiveTable
    from advml.config.store import locate
    from advml.tracking import warn_if_unusable
    from advml.tuning.command import tune

    if search.left_out:
        tell(f"note: keys of the space without effect here are left out: {', '.join(search.left_out)}")
    warn_if_unusable(locate(search.config.tracking, root=search.root))
    if missed := search.missed():
        listed = ", ".join(f"{key} = {value}" for key, value in missed.items())
        tell(f"warning: the search space does not contain the values of params.yaml, {listed}: no default is measured for comparison")
    trials = trials or search.spec.trials
    options = {"storage": storage, "trials": trials, "slots": workers, "cluster": cluster, "replace": replace}
    with LiveTable(search, total=trials) as table:
        outcome = tune(search, **options, watch=table.show)
    print("\n".join(result_lines(outcome, search)))


def result_lines(outcome: Outcome, search: Search) -> list[str]:
    """Lines that the command prints at its end.

    Raises:
        Failure: no trial was completed.
        UserError: no trial reaches the floor of clean accuracy.
    """
    from advml.tuning.command import nothing_to_apply
    from advml.tuning.space import show
    from advml.tuning.study import default_of

    metrics, count = search.metrics, len(outcome.trials)
    if outcome.best is None:
        raise _fruitless(outcome, search)
    lines = [f"{search.name}: {count} trials; the best is trial {outcome.best.number}: {show(outcome.best.params)}"]
    for who, trial in (("best", outcome.best), ("default", default_of(outcome.trials))):
        if trial is not None:
            lines.append(f"  {who}: " + ", ".join(f"{name} {value:.4g}" for name, value in zip(metrics, trial.values, strict=True)))
    for split in ("validation", "test"):
        for who, found in (outcome.confirmed or {}).get(split, {}).items():
            lines.append(f"  {split}, {who}: {_figure(found)}")
    if measured := (outcome.confirmed or {}).get("autoattack"):
        left_out = "".join(f"; {name} not run: it {reason}" for name, reason in measured.get("not_run", {}).items())
        lines.append(f"  test, autoattack: {_figure(measured['test'])}{left_out}")
    lines += confirmation_lines((outcome.confirmed or {}).get("confirmed", {}))
    why_not = nothing_to_apply(outcome, search)
    return [
        *lines,
        f"wrote {outcome.folder}: {', '.join(path.name for path in outcome.files)}",
        f"nothing to apply: {why_not}" if why_not else f"next: advml tune apply {search.name}{' --trial N' if len(metrics) > 1 else ''}",
    ]


def _fruitless(outcome: Outcome, search: Search) -> UserError | Failure:
    """Error of a search without a winner: no trial was completed, or none reaches the floor of clean accuracy."""
    from advml.tuning.study import REASON, name_of

    failed, total = [trial for trial in outcome.trials if name_of(trial) == "failed"], len(outcome.trials)
    if any(name_of(trial) == "complete" for trial in outcome.trials):
        remedy = f"lower tune.{search.kind}.clean_floor and search again, with --replace or under another --name"
        return UserError(f"no trial of {search.name} reaches the floor of clean accuracy; {remedy}")
    if not failed:
        return Failure(f"{search.name}: none of {total} trials was completed")
    count = f"all {total} trials failed" if len(failed) == total else f"{len(failed)} of {total} trials failed, others were pruned"
    return Failure(f"{search.name}: {count}, the last one: {failed[-1].user_attrs[REASON]}")


def _figure(found: dict[str, Any]) -> str:
    if "accuracy" in found:
        return f"{100 * found['accuracy']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f}, n = {found['n']})"
    winner, default = found["broken_by_winner_only"], found["broken_by_default_only"]
    told = f"{winner} images broken by the winner only, {default} by the default only, p = {found['p']:.2g}"
    if "difference" not in found:  # a record of an older version
        return told
    ends = " to ".join(f"{100 * found[end]:+.1f}" for end in ("low", "high"))
    return f"winner minus default {100 * found['difference']:+.1f} points ({ends}); {told}"


def confirmation_lines(confirmed: dict[str, Any]) -> list[str]:
    """Lines that summarise the result of `advml.tuning.training_trial.compare`."""
    lines = []
    for split in ("validation", "test") if confirmed else ():
        found = confirmed[split]
        for who in ("default", "winner"):
            lines.append(f"  further seeds, {split}, {who}: " + ", ".join(f"{name} {_spread(one)}" for name, one in found[who].items()))
        robust, verdict = found["difference"]["robust"], {None: "not known from one seed", True: "yes", False: "no"}[found["beats_default"]]
        interval = f" ({robust['low']:+.4g} to {robust['high']:+.4g})" if "low" in robust else ""
        lines.append(f"  {split}: beats the default by more than seed noise: {verdict}; robust {robust['mean']:+.4g}{interval}")
    floor = confirmed.get("clean_floor", {})
    if not floor.get("kept_on_every_seed", True):
        missed = floor["kept"].count(False)
        lines.append(f"  warning: the winner is below the clean floor {floor['floor']:g} on {missed} of {len(floor['kept'])} further seeds")
    return lines


def _spread(one: dict[str, Any]) -> str:
    return f"{one['mean']:.4g}" + (f" (sd {one['sd']:.2g})" if "sd" in one else "")
