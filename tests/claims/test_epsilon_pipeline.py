"""The pipeline that trains at other epsilons takes everything else from the main study's params.yaml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from advml import config

REPOSITORY = Path(__file__).parents[2]
PIPELINE = YAML(typ="safe").load((REPOSITORY / "pipelines" / "epsilon" / "dvc.yaml").read_text())


def test_schemes_and_seeds_are_the_main_studys():
    assert "../../params.yaml:seeds,grid" in PIPELINE["vars"]
    assert PIPELINE["stages"]["train"]["matrix"] == {"scheme": "${grid.schemes}", "epsilon": "${epsilons}", "seed": "${seeds}"}


def test_a_study_beside_the_main_one_is_attacked_at_the_main_ones_epsilon(tmp_path):
    """Run as the stage does, in a main study with another epsilon than the published one."""
    folder = tmp_path / "pipelines" / "epsilon"
    (folder / "eps-0.3").mkdir(parents=True)
    main = config.load(REPOSITORY / "params.yaml", ["threat_model.epsilon=0.12", "similarity.epsilon_studies=pipelines/epsilon/eps-*"])
    (tmp_path / "params.yaml").write_text(config.dump(main))
    (command,) = [each for each in PIPELINE["stages"]["study"]["cmd"] if "> eps-" in each]
    command = command.replace("${item.epsilon}", "0.3").replace("PYTHONPATH=../../src python", sys.executable)
    subprocess.run(command, shell=True, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")})
    beside = config.load(folder / "eps-0.3" / "params.yaml")
    assert (beside.threat_model.epsilon, beside.attacked_epsilon) == (0.3, 0.12)
    assert beside.seeds == main.seeds and beside.pretrain == main.pretrain and beside.similarity.layers == main.similarity.layers
