"""The DVC pipeline: what an edit runs again and what it leaves alone, what is called what, and one real reproduction.

Stages are addressed as `finetune_at@CL-Full-AT-0`: kind, phase, and the item of the matrix. The expectations are rules
on these names, so a new kind of stage does not have to be listed here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest
from dvc.repo import Repo

from advml import config
from advml.paths import Workspace, model_name, pretraining_name
from advml.training.regimes import REGIMES
from advml.training.schemes import SCHEMES

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")  # inside of DVC
REPOSITORY = Path(__file__).parents[1]
SMALL = ("grid.schemes=[SL]", "grid.standard_regimes=[ST]", "grid.adversarial_regimes=[]", "data.max_train=60", "data.max_test=40")
GRID = "grid.schemes=[SL, SCL]"  # the third is a row of the same matrix
QUICK = ("attack.steps=1", "evaluate.steps=1", "pretrain.SL.epochs=1", "regimes.ST.epochs=1", "runtime.device=cpu")
LAST = "evaluate_st@SL-ST-0"  # and what it needs; stages that gather many models are not for one


def repository(root: Path, *overrides: str) -> Path:
    """A git and DVC repository of this repository's pipeline and sources, with these parameters."""
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    shutil.copytree(REPOSITORY / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    write_params(root, *overrides)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    return root


def write_params(root: Path, *overrides: str) -> None:
    (root / "params.yaml").write_text(config.dump(config.load(REPOSITORY / "params.yaml", overrides)), encoding="utf-8")


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Repo]:
    """DVC takes paths relative to the current folder."""
    with contextlib.chdir(root), Repo() as repo:
        yield repo


def parts(stage: str) -> tuple[str, str, str, str, str]:
    """finetune_at@CL-Full-AT-0 -> finetune, at, CL, Full-AT, 0; without a regime, or without an item, '' stands for it."""
    kind, phase, scheme, regime, seed = re.fullmatch(r"([a-z]+)(?:_(st|at))?(?:@([A-Z]+)-(?:(.+)-)?(\d+))?", stage).groups(default="")
    return kind, phase, scheme, regime, seed


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """The study as it stands, but for a scheme, taken by DVC for done: every output is a placeholder."""
    root = repository(tmp_path_factory.mktemp("pipeline").resolve() / "committed", GRID)
    with opened(root) as repo:
        for output in (Path(output.fs_path) for stage in repo.index.stages for output in stage.outs):
            file = output if output.suffix else output / "model.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f'{{"of": "{output.name}"}}')
        repo.commit(force=True)
    return root


def after_edit(root: Path, *overrides: str) -> tuple[set[str], set[str], set[str]]:
    """All stages; those that DVC finds changed by these parameters; those together with everything behind them."""
    write_params(root, GRID, *overrides)
    with opened(root) as repo:
        changed, graph = set(repo.status()), repo.index.graph  # the graph leads from a stage to what it needs
        needs = {stage.addressing: {one.addressing for one in networkx.descendants(graph, stage)} for stage in graph}
    return set(needs), changed, {stage for stage in needs if stage in changed or needs[stage] & changed}


# Names


def test_stages_and_outputs_are_named_as_the_contract_says(committed):
    study, space = config.load(committed / "params.yaml"), Workspace(committed)
    with opened(committed) as repo:
        outputs = {stage.addressing: {Path(output.fs_path) for output in stage.outs} for stage in repo.index.stages}
        commands = {stage.addressing: stage.cmd for stage in repo.index.stages}
    models = set(itertools.product(study.grid.schemes, study.grid.regimes, map(str, study.seeds)))
    assert {parts(stage)[2:] for stage in outputs if parts(stage)[0] == "finetune"} == models
    assert {parts(stage)[2:] for stage in outputs if parts(stage)[0] == "evaluate"} == models
    for stage, found in outputs.items():
        kind, phase, scheme, regime, seed = parts(stage)
        if not scheme:
            continue
        assert scheme in SCHEMES and (not regime or phase in ("", REGIMES[regime].pretraining))
        name = model_name(scheme, regime, int(seed)) if regime else pretraining_name(scheme, phase, int(seed))
        assert all(name in (path.stem, path.parent.name) for path in found), stage
        assert f"advml {kind} {scheme} {regime or phase} --seed {seed}" in commands[stage]
        expected = {"pretrain": space.pretrained(name), "finetune": space.model(name), "evaluate": space.record("evaluate", name)}
        assert kind not in expected or expected[kind] in found
    assert committed / "models/finetune/SCL-Full-AT-s0" in outputs["finetune_at@SCL-Full-AT-0"]


# What an edit runs again


def test_where_the_history_is_kept_runs_nothing_again(committed):
    """Nor does a commit of everything leave anything to do."""
    _, changed, _ = after_edit(committed, "tracking.experiment=other")
    assert changed == set()


@pytest.mark.parametrize("regime", ["ST", "Partial-AT"])
def test_an_edited_regime_runs_its_own_models_again(committed, regime):
    stages, changed, reached = after_edit(committed, f"regimes.{regime}.epochs=77")
    of_regime = {stage for stage in stages if parts(stage)[3] == regime}
    assert changed and changed == {stage for stage in of_regime if parts(stage)[0] == "finetune"}
    assert {stage for stage in reached if parts(stage)[2]} == of_regime  # all that is done with these models, and no other model
    assert "report" in reached and "prepare" not in reached


def test_an_edited_training_attack_leaves_standard_models_alone(committed):
    stages, changed, reached = after_edit(committed, "attack.steps=77")
    assert changed and changed == {stage for stage in stages if parts(stage)[:2] in {("pretrain", "at"), ("finetune", "at")}}
    assert {stage for stage in reached if parts(stage)[1]} == {stage for stage in stages if parts(stage)[1] == "at"}


def test_an_evaluation_of_a_model_from_elsewhere_runs_the_report_again_and_nothing_else(committed):
    """`dvc repro` would otherwise restore a page without it."""
    made = Workspace(committed).given("mine")
    made.parent.mkdir()
    made.write_text("{}")
    assert after_edit(committed)[1] == {"report"}
    shutil.rmtree(made.parent)
    assert after_edit(committed)[1] == set()


# For real


@pytest.fixture(scope="module")
def dvc(warm):
    """dvc(root, "repro") -> stdout of the real command; its stages are forked from a warm process."""

    def run(root: Path, *arguments: str) -> str:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # stages say `python`
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=root, env={**os.environ, **warm, "PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, dvc, empty_store) -> Path:
    """A study of one small model, made by `dvc repro`."""
    root = repository(tmp_path_factory.mktemp("pipeline").resolve() / "reproduced", *SMALL, *QUICK)
    shutil.copy(empty_store, root / "mlflow.db")
    ran = re.findall(r"Running stage '(.*)'", dvc(root, "repro", LAST))
    assert ran == ["prepare", "pretrain_st@SL-0", "finetune_st@SL-ST-0", LAST]
    return root


def test_reproducing_a_second_time_runs_nothing(reproduced, dvc):
    before = (reproduced / "dvc.lock").read_bytes()
    said = dvc(reproduced, "repro", LAST)
    assert "Running stage" not in said and "up to date" in said
    assert (reproduced / "dvc.lock").read_bytes() == before


def test_a_lost_output_comes_back_with_the_same_bytes(reproduced):
    with opened(reproduced) as repo:
        outputs = [Path(output.fs_path) for stage in repo.stage.collect(LAST, with_deps=True) for output in stage.outs]

    def files() -> dict[Path, bytes]:
        found = [path for output in outputs for path in (output.rglob("*") if output.is_dir() else [output])]
        return {path: path.read_bytes() for path in found if path.is_file()}

    before = files()
    assert {reproduced / f"models/{kind}/model.safetensors" for kind in ("pretrain/SL-st-s0", "finetune/SL-ST-s0")} < before.keys()
    for folder in ("data", "models", "reports", "records"):
        shutil.rmtree(reproduced / folder)
    with opened(reproduced) as repo:
        repo.checkout([LAST], with_deps=True)
    assert files() == before
