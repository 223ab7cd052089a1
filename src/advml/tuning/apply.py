"""`advml tune apply NAME`: a proposal into params.yaml, as a difference that a person can review."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from advml.config import apply as parse
from advml.config import validate
from advml.errors import UserError
from advml.paths import Workspace, checked_name
from advml.rewrite import rewrite
from advml.tuning.outputs import BEST

# Proposed key -> what else it changes.
WARNINGS = {
    "evaluate.steps": "is also the number of steps of pgd-margin in worst_case, and of the attack whose images represent and compare use",
    "evaluate.step_size": "is a length: it is that long at half of epsilon, too",
}


def proposal(workspace: Workspace, name: str, *, trial: int | None = None) -> dict[str, Any]:
    """The keys and values of a study's best.yaml.

    Args:
        trial: which one of a front; None: the best.
    Raises:
        UserError: there is none, or it is damaged; or it is a front, and none of its trials is chosen.
    """
    path = workspace.reports / "tune" / checked_name(name, option="the study") / BEST
    try:
        read = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        front = {int(one["trial"]): one["parameters"] for one in read.get("front", [])}
        chosen = _chosen(front, trial, name) if front else _only(read, trial, name)
    except FileNotFoundError:
        known = sorted(other.parent.name for other in workspace.reports.glob(f"tune/*/{BEST}"))
        choices = f"choose from {', '.join(known)}" if known else "make one with: advml tune finetune CL Full-AT"
        raise UserError(f"there is no proposal {name!r}; {choices}") from None
    except (YAMLError, KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged; write it again with the command that made it") from None
    if not isinstance(chosen, dict):
        raise UserError(f"{path}: parameters must be a section of `key: value`")
    return chosen


def _chosen(front: dict[int, Any], trial: int | None, name: str) -> Any:
    if trial not in front:
        raise UserError(f"{name} proposes a front; choose one of its trials: --trial {', '.join(map(str, front))}")
    return front[trial]


def _only(read: dict[str, Any], trial: int | None, name: str) -> Any:
    if trial not in (None, read.get("trial")):
        raise UserError(f"{name} proposes trial {read.get('trial')} alone; leave --trial out")
    return read["parameters"]


def warnings(difference: str, values: dict[str, Any]) -> list[str]:
    """A line for each key that the difference changes and that means more than the search has looked at."""
    added = [line[1:].strip().partition(":")[0] for line in difference.splitlines() if line.startswith("+") and not line.startswith("+++")]
    found = [(key, said) for key, said in WARNINGS.items() if key in values and key.rpartition(".")[2] in added]
    return [f"warning: {key} = {values[key]} {said}" for key, said in found]


def merge(params: Path, values: dict[str, Any]) -> tuple[str, str]:
    """The text of params.yaml with other values, comments and all else as they were; and the difference, or ''.

    Raises:
        UserError: params.yaml does not have one of the keys, or its values do not go together.
    """
    before = params.read_text(encoding="utf-8")
    raw = parse(before, [], source=str(params))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        section, leaf = _section(raw, key, params)
        if section.get(leaf) == value and leaf in section:
            continue
        if leaf in section:
            changes[key] = value
        else:  # an option that need not be written out: the section is written anew, with it
            changes[key.rpartition(".")[0]] = section | {leaf: value}
        section[leaf] = value
    validate(raw, source=f"{params} with the proposal")
    after = rewrite(before, changes, {}) if changes else before
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(params), f"{params} (proposed)", n=1)
    return after, "".join(lines)


def _section(raw: dict[str, Any], key: str, params: Path) -> tuple[dict[str, Any], str]:
    *parents, leaf = key.split(".")
    section: Any = raw
    for name in parents:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{params} has no section {'.'.join(parents)!r}, which the proposal's {key} belongs to")
    return section, leaf
