"""`python -m advml.engine.dvc_graph plan` prints as JSON what DVC would run, `changes` why; in a process of its own: DVC takes a second."""

from __future__ import annotations

import json
import sys

from dvc.exceptions import DvcException
from dvc.repo import Repo
from networkx import descendants


def plan() -> dict[str, list[str]]:
    """Stages of dvc.yaml that have changed, with everything behind them, in order -> all stages that each needs, directly or not."""
    with Repo() as repo:
        graph, changed = repo.index.graph, set(repo.status(targets=["dvc.yaml"]))
        needs = {stage.addressing: [one.addressing for one in descendants(graph, stage)] for stage in repo.stage.collect("dvc.yaml")}
    return {name: before for name, before in needs.items() if changed.intersection([name, *before])}


def changes() -> dict[str, list[str]]:
    """Stages of dvc.yaml that have changed themselves -> what of each: `params.yaml attack.steps modified`, `data/prepared deleted`, ..."""
    with Repo() as repo:
        found = {name: [line for entry in entries for line in _lines(entry)] for name, entries in repo.status(targets=["dvc.yaml"]).items()}
        ran = {stage.addressing for stage in repo.stage.collect("dvc.yaml") if any(out.hash_info for out in stage.outs)}
    return {name: lines if name in ran else ["has not run yet"] for name, lines in found.items()}


def _lines(entry: object, path: str = "") -> list[str]:
    """Of `changed command`, or of {"changed deps": {"params.yaml": {"attack.steps": "modified"}}}."""
    if isinstance(entry, dict):
        below = [(path if key.startswith("changed ") else f"{path} {key}".strip(), value) for key, value in entry.items()]
        return [line for name, value in below for line in _lines(value, name)]
    return [f"{path} {entry}".strip()]


if __name__ == "__main__":
    try:
        print(json.dumps({"plan": plan, "changes": changes}[sys.argv[1]]()))
    except DvcException as error:
        sys.exit(" ".join(str(error).split()))
