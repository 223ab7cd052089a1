"""The winner measured once more: by one command at a time, and nothing that the study has already. Test images are looked at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from advml.lines import tell
from advml.tuning import identity, outputs
from advml.tuning.turn import Turn
from advml.tuning.worker import Search

# Attributes of the study: the winner's measurements, and those that do not depend on the winner
CONFIRMED, MEASURED = "confirmed", "measured"


def confirm(search: Search, study: optuna.Study, url: str, directions: Sequence[str], measure: Callable[..., Any]) -> None:
    """Measure the winner, and what else was asked for, unless an earlier command has, or another one is about to.

    Args:
        measure: calls a function with its arguments where that costs this process nothing.
    """

    def tell(holder: str) -> None:
        _say(search, f"the winner is being confirmed by {holder}; waiting")

    if not _is_missing(search, study, directions):
        return
    with Turn(study, url, "confirm").waited_for(tell):
        identity.require_same(study, fingerprint=search.definition().fingerprint)
        best = outputs.best_of(study.get_trials(deepcopy=False), directions)
        if _is_due(search, study, best):
            known = study.user_attrs.get(CONFIRMED) or {"trial": None, "times": 0}
            found = measure(search.confirm, best.params)
            times = known["times"] + (known["trial"] != best.number)  # on further seeds it is the same winner
            study.set_user_attr(CONFIRMED, {"trial": best.number, "times": times, "seeds": further_seeds(search), "of": found})
        for name in _unmeasured(search, study):
            study.set_user_attr(MEASURED, study.user_attrs.get(MEASURED, {}) | {name: measure(search.measure, name)})


def confirmed(study: optuna.Study, best: FrozenTrial | None) -> dict[str, Any] | None:
    """What this command or an earlier one has measured of this winner."""
    known = study.user_attrs.get(CONFIRMED)
    if best is None or known is None or known["trial"] != best.number:
        return None
    times = {"winners_confirmed": known["times"]} if known["times"] > 1 else {}
    return known["of"] | study.user_attrs.get(MEASURED, {}) | times


def further_seeds(search: Search) -> int:
    """Seeds that a winner is confirmed on: `confirm` of the search's section; 0 where there are none."""
    return max((section.get("confirm", 0) for section in search.parameters().get("tune", {}).values()), default=0)


def _is_missing(search: Search, study: optuna.Study, directions: Sequence[str]) -> bool:
    best = outputs.best_of(study.get_trials(deepcopy=False), directions)
    return best is not None and (_is_due(search, study, best, told=True) or bool(_unmeasured(search, study)))


def _is_due(search: Search, study: optuna.Study, best: FrozenTrial, *, told: bool = False) -> bool:
    """Whether this winner has not been confirmed, or on fewer seeds than `confirm` asks for; the seeds are the first n of one sequence."""
    known, wanted = study.user_attrs.get(CONFIRMED), further_seeds(search)
    if known is None or known["trial"] != best.number:
        return True
    has = known.get("seeds", wanted)
    if told and wanted != has:
        what = f"trial {best.number} has been confirmed on {has} further seeds"
        _say(search, f"{what}; confirming it on {wanted}" if wanted > has else f"{what}, more than confirm = {wanted}; they stay")
    return wanted > has


def _unmeasured(search: Search, study: optuna.Study) -> list[str]:
    return [name for name in search.once if name not in study.user_attrs.get(MEASURED, {})]


def _say(search: Search, text: str) -> None:
    tell(f"{search.name}: {text}")
