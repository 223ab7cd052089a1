"""The DVC pipeline: what an edit runs again and what it leaves alone, what is called what, that bare DVC commands work, that nothing
in params.yaml is run as a command, and one real reproduction.

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
from dataclasses import replace
from pathlib import Path

import networkx
import pytest
from dvc import cli
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo
from ruamel.yaml import YAML

from advml import config
from advml.cli.stages import stage_arguments
from advml.core.errors import UserError
from advml.core.paths import Workspace, model_name, pretraining_name
from advml.core.provenance import source_digest
from advml.pipeline.stages import check
from advml.recipes import REGIMES, SCHEMES

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")  # inside of DVC
REPOSITORY = Path(__file__).parents[1]
yaml = YAML(typ="safe")
SMALL = ("grid.schemes=[SL]", "grid.standard_regimes=[ST]", "grid.adversarial_regimes=[]", "data.max_train=60", "data.max_test=40")
MADE = ("data", "models", "reports", "records", "mlruns", "mlflow.db*", "dvc.lock", ".scratch", "cache", "tmp", "eps-*")  # by pipelines
GRID = "grid.schemes=[SL, SCL]"  # the third is a row of the same matrix
QUICK = ("attack.steps=1", "evaluate.steps=1", "pretrain.SL.epochs=1", "regimes.ST.epochs=1", "runtime.device=cpu")
LAST = "evaluate_st@SL-ST-0"  # and what it needs; stages that gather many models are not for one


def repository(root: Path, *overrides: str) -> Path:
    """A git and DVC repository of this repository's pipeline and sources, with these parameters."""
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    shutil.copytree(REPOSITORY / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "pipelines", root / "pipelines", symlinks=True, ignore=shutil.ignore_patterns(*MADE))
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
    return with_placeholders(repository(tmp_path_factory.mktemp("pipeline").resolve() / "committed", GRID))


def with_placeholders(root: Path) -> Path:
    with opened(root) as repo:
        for output in (Path(output.fs_path) for stage in repo.index.stages for output in stage.outs):
            file = output if output.suffix else output / "model.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f'{{"of": "{output.name}"}}')
        repo.commit(force=True)
    return root


@pytest.fixture
def copied(committed, tmp_path) -> Path:
    """For tests that change more of it than parameters."""
    shutil.copytree(committed, tmp_path / "copied", symlinks=True)
    write_params(tmp_path / "copied", GRID)
    return tmp_path / "copied"


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
        for told in (stage, f"dvc.yaml:{stage}", f"../study/dvc.yaml:{stage}"):  # from another folder, DVC tells the file as well
            assert stage_arguments(told) == [kind, scheme, regime or phase, "--seed", seed]
        assert commands[stage] == 'PYTHONPATH=src python -m advml stage "$DVC_STAGE"'
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


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        ("figures/curves.py", {"represent", "compare", "transfer", "report"}),
        ("training/schedules.py", {"pretrain", "finetune", "evaluate", "compare", "transfer"}),
        ("tuning/study.py", set()),
    ],
)
def test_an_edited_source_is_one_change_to_dvc_and_to_the_stages_themselves(copied, sources, file, kinds):
    """The key by which a stage resumes, and takes a result as it is, covers the sources that dvc.yaml lists."""
    every = {stage.partition("_")[0] for stage in yaml.load(REPOSITORY / "dvc.yaml")["stages"]}
    before = {kind: source_digest(kind) for kind in every}
    sources.edit(file)
    shutil.copy(sources.package / file, copied / "src" / "advml" / file)
    after = {kind: source_digest(kind) for kind in every}
    assert {kind for kind in every if after[kind] != before[kind]} == kinds
    assert {parts(stage)[0] for stage in after_edit(copied)[1]} == kinds


# Nothing in params.yaml is a command

PLANTED = """0; touch PWNED; $(touch PWNED) `touch PWNED` '; touch PWNED; ' "; touch PWNED; " #"""
PIPELINES = sorted({path.resolve() for path in [REPOSITORY / "dvc.yaml", *REPOSITORY.glob("pipelines/*/dvc.yaml")]})


def interpolated(pipeline: Path) -> set[str]:
    """The keys of params.yaml that a dvc.yaml puts into its stages; `phase` is its own."""
    keys = re.findall(r"\$\{(.*?)\}", pipeline.read_text(encoding="utf-8"))
    return {key for key in keys if not key.startswith("item.") and key != "phase"}


def plant(root: Path, *keys: str) -> None:
    """Commands in place of these lists of params.yaml."""
    values = yaml.load(root / "params.yaml")
    for section, _, key in (key.rpartition(".") for key in keys):
        (values[section] if section else values)[key] = [f"{PLANTED} {key}"]
    yaml.dump(values, root / "params.yaml")


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_command_holds_a_value_of_params(pipeline):
    commands = [stage["cmd"] for stage in yaml.load(pipeline)["stages"].values()]
    assert commands and not any("${" in str(command) for command in commands)


@pytest.mark.parametrize("key", sorted(interpolated(REPOSITORY / "dvc.yaml")))
def test_a_value_that_would_name_stages_and_files_is_refused_by_its_key(copied, key):
    plant(copied, key)
    with pytest.raises(UserError, match=rf"{re.escape(str(copied / 'params.yaml'))}: {re.escape(key)}\[0\] = [^\n]*$"):
        check.run(copied / "params.yaml")


def test_a_regime_whose_stage_does_not_watch_its_attack_is_refused(tmp_path, monkeypatch):
    """DVC would take its models for up to date after the attack has changed."""
    params, pipeline = (Path(shutil.copy(REPOSITORY / name, tmp_path)) for name in ("params.yaml", "dvc.yaml"))
    check.run(params)
    monkeypatch.setitem(REGIMES, "ST", replace(REGIMES["ST"], attacked=True))
    with pytest.raises(UserError, match=r"finetune_st .*ST.* threat_model, attack$"):
        check.run(params)
    pipeline.write_text(pipeline.read_text().replace('item.regime}", runtime]', 'item.regime}", runtime, threat_model, attack]'))
    check.run(params)


def test_every_stage_waits_for_the_check_of_all_that_is_interpolated(committed):
    watched = yaml.load(REPOSITORY / "dvc.yaml")["stages"]["check"]["params"]
    assert {key.partition(".")[0] for key in interpolated(REPOSITORY / "dvc.yaml")} <= set(watched)
    with opened(committed) as repo:
        graph = repo.index.graph
        (first,) = repo.stage.collect("check")
        assert set(graph) == {first} | networkx.ancestors(graph, first)


def test_a_planted_command_is_not_run_with_the_check_nor_without_it(copied, dvc):
    plant(copied, *interpolated(REPOSITORY / "dvc.yaml"))
    said = dvc(copied, "repro", code=255)
    (line,) = re.findall(r"^advml: .*", said, flags=re.MULTILINE)
    assert line.startswith("advml: params.yaml: seeds[0] = ")
    write_params(copied, GRID)
    plant(copied, "seeds")
    said = dvc(copied, "repro", "--single-item", f"pretrain_st@SL-{PLANTED} seeds", code=255)
    assert "advml: 'pretrain_st@SL-0; touch PWNED" in said
    assert not list(copied.rglob("PWNED"))


def test_dvc_and_advml_take_the_same_overrides(tmp_path):
    """`dvc exp run -S` wants a plus before a key that params.yaml does not write; what it then writes is what `advml -S` means."""
    pytest.importorskip("hydra")
    from dvc.utils.hydra import apply_overrides

    params = tmp_path / "params.yaml"
    overrides = ["+regimes.Full-AT.loss=trades", "++evaluate.restarts=3", "++temperature=0.5", "seeds=[1, 2]", "+cluster.slots=2"]
    overrides += ["threat_model.epsilon=4/255", "+tune.finetune.space.gradient_clip={float: [0.1, 1]}"]
    expected = config.load(REPOSITORY / "params.yaml", overrides)
    shutil.copy(REPOSITORY / "params.yaml", params)
    apply_overrides(params, overrides)
    assert config.load(params) == expected != config.load(REPOSITORY / "params.yaml")


# Bare commands

BARE = ("pull", "checkout", "status", "data status", "metrics show", "metrics diff", "gc -w -f")


def test_bare_commands_work_in_a_clone(tmp_path, monkeypatch, capsys):
    """Pipelines that have not run are not part of the repository that they lie in."""
    root = with_placeholders(repository(tmp_path / "origin", *SMALL))
    (root / ".dvc" / "config").write_text(f"[core]\n    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n")
    (tmp_path / "store").mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["add", "."], ["commit", "-qm", "all"], ["clone", "-q", ".", str(tmp_path / "clone")]):
        subprocess.run([*git, *command], cwd=root, check=True)
    assert (tmp_path / "clone" / "dvc.lock").is_file() and (tmp_path / "clone" / "pipelines" / "smoke" / "dvc.yaml").is_file()
    said = {}
    for folder, commands in (("origin", ["push"]), ("clone", BARE)):
        monkeypatch.chdir(tmp_path / folder)
        for command in commands:
            code, said[command] = cli.main(command.split()), capsys.readouterr().out
            assert code == 0, (folder, command, said[command])
    assert "up to date" in said["status"] and "No changes" in said["data status"]
    assert subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout == ""


def test_the_committed_lock_is_of_the_committed_stages_and_parameters(tmp_path):
    """`dvc pull` and `dvc metrics diff` go by it. Sources are not compared: an edit of them need not change a result."""

    def at_head(name: str) -> bytes | None:
        done = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=REPOSITORY, capture_output=True, check=False)
        return done.stdout if done.returncode == 0 else None

    if not (REPOSITORY / ".git").exists():
        pytest.skip("a release archive has no commits")
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(at_head(name))
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    with opened(tmp_path) as repo:
        stages = repo.index.stages
        params = {dep: stage.addressing for stage in stages for dep in stage.deps if isinstance(dep, ParamsDependency)}
        assert yaml.load(tmp_path / "dvc.lock")["stages"].keys() == {stage.addressing for stage in stages}
        assert [stage.addressing for stage in stages if stage.changed_stage()] == []  # their commands
        assert {stage: dep.status() for dep, stage in params.items() if dep.status()} == {}


def test_an_evaluation_of_a_model_from_elsewhere_runs_what_reads_all_records_again_and_nothing_else(committed):
    """`dvc repro` would otherwise restore a page without it. `transfer` depends on all records of `evaluate`."""
    made = Workspace(committed).record("evaluate", "mine")
    made.write_text("{}")
    assert after_edit(committed)[1] == {"report", "transfer"}
    made.unlink()
    assert after_edit(committed)[1] == set()


# For real


@pytest.fixture(scope="module")
def dvc(warm):
    """dvc(root, "repro") -> what the real command prints; its stages are forked from a warm process."""

    def run(root: Path, *arguments: str, code: int = 0) -> str:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # stages say `python`
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=root, env={**os.environ, **warm, "PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, dvc, empty_store) -> Path:
    """A study of one small model, made by `dvc repro`."""
    root = repository(tmp_path_factory.mktemp("pipeline").resolve() / "reproduced", *SMALL, *QUICK)
    shutil.copy(empty_store, root / "mlflow.db")
    ran = re.findall(r"Running stage '(.*)'", dvc(root, "repro", LAST))
    assert ran == ["check", "prepare", "pretrain_st@SL-0", "finetune_st@SL-ST-0", LAST]
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
