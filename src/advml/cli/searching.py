"""Run a search for the commands of `advml tune`, and print its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from advml.core.errors import Failure, UserError
from advml.core.messages import tell

if TYPE_CHECKING:
    from advml.tuning.command import Outcome
    from advml.tuning.search import Search


def run(search: Search, *, trials: int | None, workers: int, cluster: str | None, storage: str | None, replace: bool) -> None:
    """Search until `trials` trials have finished (None: the number in params.yaml), then print the result."""
    from advml.cli.live_table import LiveTable
    from advml.config.store import locate
    from advml.tracking import warn_if_unusable
    from advml.tuning.command import tune

    warn_if_unusable(locate(search.config.tracking, root=search.root))
    if missed := search.missed():
        listed = ", ".join(f"{key} = {value}" for key, value in missed.items())
        tell(f"warning: the search space does not contain the values of params.yaml, {listed}: no default is measured for comparison")
    trials = trials or search.spec.trials
    options = {"storage": storage, "trials": trials, "slots": workers, "cluster": cluster, "replace": replace}
    with LiveTable(search, total=trials) as table:
        outcome = tune(search, **options, watch=table.show)
    print("\n".join(told(outcome, search)))


def told(outcome: Outcome, search: Search) -> list[str]:
    """Lines that the command prints at its end.

    Raises:
        Failure: no trial was completed.
        UserError: no trial reaches the floor of clean accuracy.
    """
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
    if "autoattack" in (outcome.confirmed or {}):
        lines.append(f"  test, autoattack: {_figure(outcome.confirmed['autoattack']['test'])}")
    lines += further((outcome.confirmed or {}).get("confirmed", {}))
    return [
        *lines,
        f"wrote {outcome.folder}: {', '.join(path.name for path in outcome.files)}",
        f"next: advml tune apply {search.name}{' --trial N' if len(metrics) > 1 else ''}",
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


def further(confirmed: dict[str, Any]) -> list[str]:
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
