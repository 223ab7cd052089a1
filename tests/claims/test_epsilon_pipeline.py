"""The studies of other training epsilons take everything else from the main study's params.yaml, and its stages."""

from __future__ import annotations

import contextlib
import runpy
import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo

from advml import config
from advml.core.errors import UserError

REPOSITORY = Path(__file__).parents[2]
study = runpy.run_path(str(REPOSITORY / "pipelines" / "epsilon" / "run.py"))["study"]


@pytest.fixture
def main(tmp_path) -> config.Config:
    """A main study with another epsilon than the published one."""
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(REPOSITORY / name, tmp_path)
    overrides = ["threat_model.epsilon=0.12", "seeds=[3]", "similarity.epsilon_studies=pipelines/epsilon/eps-*"]
    (tmp_path / "params.yaml").write_text(config.dump(config.load(REPOSITORY / "params.yaml", overrides)))
    return config.load(tmp_path / "params.yaml")


def test_a_study_beside_the_main_one_is_attacked_at_the_main_ones_epsilon(tmp_path, main):
    folder = study(tmp_path, "0.3")
    beside = config.load(folder / "params.yaml")
    assert folder == tmp_path / "pipelines" / "epsilon" / "eps-0.3" and study(tmp_path, "0.3") == folder
    assert (beside.threat_model.epsilon, beside.attacked_epsilon) == (0.3, 0.12)
    kept = ("seeds", "data", "model", "temperature", "views", "attack", "pretrain", "regimes", "diagnostics", "corruptions", "runtime")
    assert all(getattr(beside, key) == getattr(main, key) for key in kept) and beside.grid.schemes == main.grid.schemes
    assert beside.similarity.layers == main.similarity.layers


@pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")  # inside of DVC
def test_it_trains_the_at_models_alone_with_the_main_studys_stages(tmp_path, main):
    with contextlib.chdir(study(tmp_path, "0.3")), Repo() as repo:
        assert Path(repo.root_dir) == Path.cwd()
        lasts = repo.stage.collect("represent_at")
        needed = {stage.addressing for last in lasts for stage in repo.stage.collect(last.addressing, with_deps=True)}
    of_models = {f"{kind}_at@{name}" for kind in ("finetune", "evaluate", "represent") for name in ("SL-AT-3", "CL-AT-3", "SCL-AT-3")}
    assert needed == of_models | {"check", "prepare", "pretrain_at@SL-3", "pretrain_at@CL-3", "pretrain_at@SCL-3"}


@pytest.mark.parametrize(
    ("epsilon", "told"),
    [("8/255", "eps-8/255"), ("0.1; id", "eps-0.1; id"), ("..", "threat_model.epsilon"), ("-1", "threat_model.epsilon")],
)
def test_an_epsilon_that_names_no_folder_or_is_no_number_is_refused(tmp_path, main, epsilon, told):
    with pytest.raises(UserError, match=f"^[^\n]*{told}[^\n]*$"):
        study(tmp_path, epsilon)
    assert not (tmp_path / "pipelines").exists()
