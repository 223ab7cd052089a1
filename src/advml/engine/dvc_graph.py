"""`python -m advml.engine.dvc_graph` prints as JSON what DVC would run; in a process of its own, as DVC takes a second to import."""

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


if __name__ == "__main__":
    try:
        print(json.dumps(plan()))
    except DvcException as error:
        sys.exit(" ".join(str(error).split()))
