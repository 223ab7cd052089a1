"""Stage `check`: validate params.yaml, in particular the values that become names of stages and files in dvc.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

from advml.config import Config, load
from advml.core.errors import UserError
from advml.core.io import write_atomically
from advml.core.paths import Workspace
from advml.recipes import REGIMES

ATTACK_SECTIONS = ("threat_model", "attack")


def run(params: Path, overrides: Sequence[str] = ()) -> Path | None:
    """Validate params.yaml and, without overrides, write `data/checked`, on which `prepare` and hence every stage depends.

    This is a stage of its own because DVC deletes a stage's outputs before it starts the command, so that a seed such as `../x` must be
    refused one stage earlier. The file's content is constant, so that changed seeds do not make `prepare` run again. `dvc checkout -f` runs
    no stage, and deletes the paths that a seed such as `/../../../x` makes outputs, within the repository; dvc.yaml cannot prevent that. So
    check a params.yaml from elsewhere before using DVC.

    Raises:
        UserError: params.yaml is not valid, or dvc.yaml lacks the attack's parameters for a regime of the grid.
    """
    _check_attacks(load(params, tuple(overrides)), params.with_name("dvc.yaml"))
    if overrides:
        return None
    checked = Workspace(params.parent).checked
    checked.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(checked, b"params.yaml was valid when the stage `check` ran\n")
    return checked


def _check_attacks(config: Config, pipeline: Path) -> None:
    """Raise UserError unless stages of attacked fine-tunings depend on the attack's parameters, so that they rerun when these change."""
    attacked = [regime for regime in config.grid.regimes if REGIMES[regime].attacked]
    stages = YAML(typ="safe").load(pipeline)["stages"] if attacked and pipeline.is_file() else {}
    for regime in attacked:
        stage = f"finetune_{REGIMES[regime].pretraining}"
        if stage in stages and (lacking := [key for key in ATTACK_SECTIONS if key not in stages[stage].get("params", ())]):
            raise UserError(
                f"{pipeline}: {stage} trains {regime} under attack and must depend on it; add to its params: {', '.join(lacking)}"
            )
