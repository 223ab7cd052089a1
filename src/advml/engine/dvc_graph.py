"""What DVC knows of the pipeline, as JSON: which stage needs which, and which have changed.

`python -m advml.engine.dvc_graph` prints it in the folder of dvc.yaml: in a process of its own, because DVC takes a second to import and
sets up logging and signals.
"""

from __future__ import annotations

import json
import sys

from dvc.exceptions import DvcException
from dvc.repo import Repo


def main() -> None:
    """{"stages": [those of dvc.yaml, in order], "needs": {stage: [stages it needs directly]}, "changed": [stages]}."""
    try:
        with Repo() as repo:
            graph = repo.index.graph
            stages = [stage.addressing for stage in repo.stage.collect("dvc.yaml")]
            needs = {stage.addressing: sorted(other.addressing for other in graph.successors(stage)) for stage in graph}
            changed = list(repo.status(targets=["dvc.yaml"]))
    except DvcException as error:
        sys.exit(" ".join(str(error).split()))
    print(json.dumps({"stages": stages, "needs": needs, "changed": changed}))


if __name__ == "__main__":
    main()
