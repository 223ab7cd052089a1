"""`advml tune apply NAME`: read a search's proposal, and warn of effects beyond what was searched."""

from __future__ import annotations

import re
from typing import Any

from advml.core.errors import UserError
from advml.core.io import read_json
from advml.core.paths import Workspace, checked_name
from advml.tuning.outputs import BEST

# Pattern of keys or sections that affect more than a search has measured -> explanation.
WARNINGS = {
    r"evaluate\.steps": "is also the number of steps of pgd-margin in worst_case, and of the attack whose images represent and compare use",
    r"evaluate\.step_size": "is an absolute length, used at half of epsilon, too",
    r"regimes\.[^.]+": "is used for every scheme of the grid; the search has measured one",
    r"pretrain\.[^.]+": "is used in both phases, st and at; the search has measured one",
    r"views\.contrastive": "is used for every contrastive scheme and both phases; the search has measured one of each",
    r"views\.supervised": "is used in both phases, st and at; the search has measured one",
    r"temperature": "is used for every contrastive scheme, and in threat model I of every evaluation; the search has measured one scheme",
}


def proposal(workspace: Workspace, name: str, *, trial: int | None = None) -> dict[str, Any]:
    """Keys and values of a search's best.yaml.

    Args:
        trial: number of a trial on a Pareto front; None: the best.
    Raises:
        UserError: the file is missing or damaged; or it contains a front, and no trial of it is chosen.
    """
    path = workspace.reports / "tune" / checked_name(name, option="the study") / BEST
    if not path.exists():
        known = sorted(other.parent.name for other in workspace.reports.glob(f"tune/*/{BEST}"))
        choices = f"choose from {', '.join(known)}, or " if known else ""
        raise UserError(f"there is no proposal {name!r}; {choices}make it with: {_command_of(name)}")
    remedy = "repeat the search's command, which writes it again"
    best = read_json(path, needs=("parameters",), remedy=remedy)
    try:
        front = {int(one["trial"]): dict(one["parameters"]) for one in best.get("front", [])}
        only = dict(best["parameters"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged (parameters must be sections of `key: value`); {remedy}") from None
    if front and trial not in front:
        raise UserError(f"{name} proposes a Pareto front; choose one of its trials: --trial {', '.join(map(str, front))}")
    if not front and trial not in (None, best.get("trial")):
        raise UserError(f"{name} proposes only trial {best.get('trial')}; leave out --trial")
    return front[trial] if front else only


def _command_of(name: str) -> str:
    """Command of the search with this name, if the name is one that a search gets by default."""
    if name.startswith("attack-"):
        return f"advml tune attack {name.removeprefix('attack-')}"
    if found := re.fullmatch(r"(finetune|pretrain)-([^-]+)-(.+)-s(\d+)(-pareto)?", name):
        kind, scheme, which, seed, pareto = found.groups()
        return f"advml tune {kind} {scheme} {which}{f' --seed {seed}' if int(seed) else ''}{' --pareto' if pareto else ''}"
    return f"advml tune attack|finetune|pretrain ... --name {name}"


def warnings(changes: dict[str, Any]) -> list[str]:
    """Warnings for changed keys or sections that affect more than the search has measured."""
    found = []
    for pattern, said in WARNINGS.items():
        matches = [(match.group(), key, value) for key, value in changes.items() if (match := re.match(pattern, key))]
        told = dict.fromkeys(f"{key} = {value}" if what == key else what for what, key, value in matches)
        found += [f"warning: {one} {said}" for one in told]
    return found
