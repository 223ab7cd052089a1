"""`check`: params.yaml is valid, in particular all that dvc.yaml makes names of stages and files from."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML

from advml.config import Config, load
from advml.core.errors import UserError
from advml.core.io import write_atomically
from advml.core.paths import Workspace
from advml.recipes import REGIMES

OF_THE_ATTACK = ("threat_model", "attack")


def run(params: Path) -> Path:
    """Validate params.yaml and write `data/checked`, on which `prepare` and so every stage depends.

    DVC empties a stage's outputs before it starts the command, so a seed `../x` must stop it one stage earlier. The file
    is always the same: other seeds do not make `prepare` run again. `dvc checkout -f` runs no stage, and deletes what a seed
    `/../../../x` makes an output, within the repository: nothing in dvc.yaml can forbid that. Check a params.yaml from elsewhere first.

    Raises:
        UserError: params.yaml is not valid, or dvc.yaml does not watch the attack of a regime of the grid.
    """
    _check_attacks(load(params), params.with_name("dvc.yaml"))
    checked = Workspace(params.parent).checked
    checked.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(checked, b"params.yaml was valid when the stage `check` ran\n")
    return checked


def _check_attacks(config: Config, pipeline: Path) -> None:
    """The stage of an attacked fine-tuning must depend on the attack, or it would stay up to date when the attack changes."""
    attacked = [regime for regime in config.grid.regimes if REGIMES[regime].attacked]
    stages = YAML(typ="safe").load(pipeline)["stages"] if attacked and pipeline.is_file() else {}
    for regime in attacked:
        stage = f"finetune_{REGIMES[regime].pretraining}"
        if stage in stages and (lacking := [key for key in OF_THE_ATTACK if key not in stages[stage].get("params", ())]):
            raise UserError(
                f"{pipeline}: {stage} trains {regime} under attack and must depend on it; add to its params: {', '.join(lacking)}"
            )
