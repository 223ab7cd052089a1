"""`advml tune apply NAME`: what a search proposes, and what it means for more than was searched."""

from __future__ import annotations

import re
from typing import Any

from advml.core.errors import UserError
from advml.core.io import read_json
from advml.core.paths import Workspace, checked_name
from advml.tuning.outputs import BEST

# Keys or sections of which a proposal means more than its search has looked at -> what else they change.
WARNINGS = {
    r"evaluate\.steps": "is also the number of steps of pgd-margin in worst_case, and of the attack whose images represent and compare use",
    r"evaluate\.step_size": "is a length: it is that long at half of epsilon, too",
    r"regimes\.[^.]+": "counts for every scheme of the grid; the search has looked at one",
    r"pretrain\.[^.]+": "counts for both phases, st and at; the search has looked at one",
    r"views\.contrastive": "counts for every contrastive scheme and both phases; the search has looked at one of each",
    r"views\.supervised": "counts for both phases, st and at; the search has looked at one",
    r"temperature": "counts for every contrastive scheme, and in threat model I of every evaluation; the search has looked at one scheme",
}


def proposal(workspace: Workspace, name: str, *, trial: int | None = None) -> dict[str, Any]:
    """The keys and values of a study's best.yaml.

    Args:
        trial: which one of a front; None: the best.
    Raises:
        UserError: there is none, or it is damaged; or it is a front, and none of its trials is chosen.
    """
    path = workspace.reports / "tune" / checked_name(name, option="the study") / BEST
    if not path.exists():
        known = sorted(other.parent.name for other in workspace.reports.glob(f"tune/*/{BEST}"))
        choices = f"choose from {', '.join(known)}" if known else "make one with: advml tune finetune CL Full-AT"
        raise UserError(f"there is no proposal {name!r}; {choices}")
    remedy = "write it again with the command that made it"
    best = read_json(path, needs=("parameters",), remedy=remedy)
    try:
        front = {int(one["trial"]): dict(one["parameters"]) for one in best.get("front", [])}
        only = dict(best["parameters"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged (parameters must be sections of `key: value`); {remedy}") from None
    if front and trial not in front:
        raise UserError(f"{name} proposes a front; choose one of its trials: --trial {', '.join(map(str, front))}")
    if not front and trial not in (None, best.get("trial")):
        raise UserError(f"{name} proposes trial {best.get('trial')} alone; leave --trial out")
    return front[trial] if front else only


def warnings(changes: dict[str, Any]) -> list[str]:
    """A line for each key or section that is changed and means more than the search has looked at."""
    found = []
    for pattern, said in WARNINGS.items():
        matches = [(match.group(), key, value) for key, value in changes.items() if (match := re.match(pattern, key))]
        told = dict.fromkeys(f"{key} = {value}" if what == key else what for what, key, value in matches)
        found += [f"warning: {one} {said}" for one in told]
    return found
