"""`check`: params.yaml is valid, in particular all that dvc.yaml makes names of stages and files from."""

from __future__ import annotations

from pathlib import Path

from advml.config import load
from advml.paths import Workspace
from advml.runtime.checkpoint import write_atomically


def run(params: Path) -> Path:
    """Validate params.yaml and write `data/checked`, on which `prepare` and so every stage depends.

    DVC empties a stage's outputs before it starts the command, so a seed `../x` must stop it one stage earlier. The file
    is always the same: other seeds do not make `prepare` run again. `dvc checkout -f` runs no stage, and deletes what a seed
    `/../../../x` makes an output, within the repository: nothing in dvc.yaml can forbid that. Check a params.yaml from elsewhere first.

    Raises:
        UserError: params.yaml is not valid.
    """
    load(params)
    checked = Workspace(params.parent).checked
    checked.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(checked, b"params.yaml was valid when the stage `check` ran\n")
    return checked
