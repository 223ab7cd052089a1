"""The DVC pipeline: what a change runs again, what it does not, and one real reproduction of a tiny study."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from advml import config
from advml.paths import Workspace, model_name, pretraining_name
from advml.regimes import REGIMES

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value will soon:DeprecationWarning")  # inside of DVC
REPOSITORY = Path(__file__).parents[1]
SCHEMES, STANDARD, ADVERSARIAL = ("SL", "CL"), ("ST",), ("AT", "Full-AT")
YAML_FILE = YAML(typ="safe")


def repository(root: Path, changes: dict[str, Any]) -> Path:
    """A copy of this repository's pipeline, sources and parameters, the latter with `changes` by dotted key."""
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(REPOSITORY / name, root / name)
    shutil.copytree(REPOSITORY / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    edit_params(root, changes, source=REPOSITORY / "params.yaml")
    return root


def edit_params(root: Path, changes: dict[str, Any], *, source: Path | None = None) -> None:
    values = YAML_FILE.load(source or root / "params.yaml")
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        section = values
        for name in parents:
            section = section[name]
        assert leaf in section, key
        section[leaf] = value
    with (root / "params.yaml").open("w") as file:
        YAML_FILE.dump(values, file)


def status(root: Path) -> set[str]:
    """The stages that DVC finds changed."""
    with Repo(root) as repo:
        return set(repo.status())


# What is written where


def grid(schemes=SCHEMES, standard=STANDARD, adversarial=ADVERSARIAL, seeds=(0,)) -> dict[str, set[str]]:
    """Stage -> outputs, from the names that the code uses."""
    space = Workspace()
    stages = {"prepare": {space.prepared}, "report": {space.reports / f"summary.{end}" for end in ("md", "png", "csv")}}
    for scheme, phase, seed in itertools.product(schemes, ("st", "at"), seeds):
        name = pretraining_name(scheme, phase, seed)
        stages[f"pretrain_{phase}@{scheme}-{seed}"] = {space.pretrained(name), space.report(name) / "history.json"}
    for scheme, regime, seed in itertools.product(schemes, (*standard, *adversarial), seeds):
        name, phase = model_name(scheme, regime, seed), REGIMES[regime].pretraining
        stages[f"finetune_{phase}@{scheme}-{regime}-{seed}"] = {space.model(name), space.report(name) / "history.json"}
        stages[f"evaluate_{phase}@{scheme}-{regime}-{seed}"] = {space.record("evaluate", name), space.report(name) / "metrics.json"}
    return {stage: {str(path) for path in outputs} for stage, outputs in stages.items()}


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """A pipeline that DVC takes for done: every output is a placeholder."""
    root = repository(
        tmp_path_factory.mktemp("pipeline") / "committed", {"grid.schemes": [*SCHEMES], "grid.adversarial_regimes": [*ADVERSARIAL]}
    )
    with Repo(root) as repo:
        for output in (Path(output.fs_path) for stage in repo.index.stages for output in stage.outs):
            file = output if output.suffix else output / "model.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"of": output.name}))
        repo.commit(force=True)
    return root


@pytest.fixture
def done(committed) -> Iterator[Path]:
    """It; edits of parameters and sources are taken back afterwards."""
    params = (committed / "params.yaml").read_text()
    yield committed
    (committed / "params.yaml").write_text(params)


def test_stages_have_the_names_and_the_outputs_of_the_contract(committed):
    with Repo(committed) as repo:
        found = {stage.addressing: {str(Path(out.fs_path).relative_to(committed)) for out in stage.outs} for stage in repo.index.stages}
        commands = {stage.addressing: stage.cmd for stage in repo.index.stages}
    assert found == grid()
    for stage, command in commands.items():
        kind, _, item = stage.partition("@")
        name, _, phase = kind.partition("_")
        scheme, _, rest = item.partition("-")
        regime, _, seed = rest.rpartition("-")
        words = {"pretrain": f"{scheme} {phase} --seed {rest}", "finetune": f"{scheme} {regime} --seed {seed}"}
        expected = f"PYTHONPATH=src python -m advml {name} {words.get('finetune' if name == 'evaluate' else name, '')}".rstrip()
        assert command == expected


def test_adversarial_pretraining_happens_once_for_all_regimes(committed):
    with Repo(committed) as repo:
        users = {stage.addressing for stage in repo.index.stages for dep in stage.deps if dep.def_path.endswith("models/pretrain/CL-at-s0")}
    assert users == {"finetune_at@CL-AT-0", "finetune_at@CL-Full-AT-0"}


# What a change runs again


CHANGES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({}, ()),
    "one regime": ({"regimes.Full-AT.epochs": 9}, ("finetune_at@*-Full-AT-0",)),
    "the standard regime": ({"regimes.ST.learning_rate": 0.5}, ("finetune_st@*",)),
    "one scheme's pretraining": ({"pretrain.CL.epochs": 39}, ("pretrain_??@CL-0",)),
    "the attack in training": ({"attack.steps": 4}, ("pretrain_at@*", "finetune_at@*")),
    "the threat model": ({"threat_model.epsilon": 0.1}, ("pretrain_at@*", "finetune_at@*", "evaluate_*", "report")),
    "the attack at evaluation": ({"evaluate.steps": 3}, ("evaluate_*",)),
    "the network": ({"model.projection_size": 50}, ("pretrain_*", "finetune_*")),
    "the views": ({"views.contrastive": {"shift": 0.1}}, ("pretrain_*",)),
    "the data": ({"data.max_train": 100}, ("prepare",)),
    "where history is kept": ({"tracking.experiment": "other"}, ()),
    "a further seed": ({"seeds": [0, 1]}, ("pretrain_??@*-1", "finetune_*-1", "evaluate_*-1", "report")),
}


@pytest.mark.parametrize(("changes", "patterns"), CHANGES.values(), ids=CHANGES)
def test_a_changed_parameter_runs_again_what_it_reaches_and_nothing_else(done, changes, patterns):
    edit_params(done, changes)
    stages = grid(seeds=changes.get("seeds", (0,)))
    expected = {stage for stage in stages if any(fnmatch(stage, pattern) for pattern in patterns)}
    assert all(any(fnmatch(stage, pattern) for stage in stages) for pattern in patterns)
    assert status(done) == expected


SOURCES = {
    "evaluation.py": ("evaluate_*",),
    "attacks/pgd.py": ("pretrain_*", "finetune_*", "evaluate_*"),
    "stages/finetune.py": ("finetune_*",),
    "plots.py": ("report",),
    "cli.py": (),
    "progress.py": (),
    "tracking/run.py": (),
}


def test_changed_sources_run_again_the_stages_that_execute_them(done):
    for name, patterns in SOURCES.items():
        path = done / "src" / "advml" / name
        before = path.read_text()
        path.write_text(before + "\n# edited\n")
        found = status(done)
        path.write_text(before)
        assert found == {stage for stage in grid() if any(fnmatch(stage, pattern) for pattern in patterns)}, name


def test_a_lost_output_comes_back_from_the_cache(done):
    lost = done / "models" / "finetune" / "CL-Full-AT-s0"
    shutil.rmtree(lost)
    assert status(done) == {"finetune_at@CL-Full-AT-0", "evaluate_at@CL-Full-AT-0"}
    with Repo(done) as repo:
        repo.checkout()
    assert json.loads((lost / "model.json").read_text()) == {"of": "CL-Full-AT-s0"} and status(done) == set()


# Keys


def expansions(text: str, configuration: config.Config) -> set[str]:
    """`pretrain.${item.scheme}` -> pretrain.SL, pretrain.CL, ..."""
    values = {"scheme": configuration.grid.schemes, "regime": configuration.grid.regimes, "seed": configuration.seeds}
    found = {text}
    for key, choices in values.items():
        found = {one.replace(f"${{item.{key}}}", str(choice)) for one in found for choice in choices}
    return found


@pytest.mark.parametrize("folder", [".", "pipelines/smoke"])
def test_every_parameter_that_dvc_tracks_is_in_params_yaml(folder):
    """DVC takes a key that is not there for a value of its own, which never changes."""
    root = REPOSITORY / folder
    configuration = config.load(root / "params.yaml")
    known = config.flatten(YAML_FILE.load(root / "params.yaml"))
    for stage in YAML_FILE.load(root / "dvc.yaml")["stages"].values():
        for key in itertools.chain.from_iterable(expansions(key, configuration) for key in stage.get("params", [])):
            assert any(name == key or name.startswith(f"{key}.") for name in known), key


def test_the_smoke_pipeline_can_be_planned(tmp_path):
    root = repository(tmp_path / "repository", {})
    shutil.copytree(REPOSITORY / "pipelines" / "smoke", root / "pipelines" / "smoke", ignore=lambda folder, names: set(names) - SMOKE)
    with Repo(root) as repo:
        names = {stage.addressing for stage in repo.index.stages if "smoke" in stage.addressing}
    short = {name.partition(":")[2] for name in names}
    assert {"prepare", "report", "pretrain@CL-at", "train@SL-Full-AT"} <= short


SMOKE = {"dvc.yaml", "params.yaml"}


def test_dvc_does_not_look_at_what_changes_by_itself():
    ignored = (REPOSITORY / ".dvcignore").read_text().split()
    assert {"__pycache__/", ".scratch/", ".venv/"} <= set(ignored)


# For real


def test_a_tiny_study_runs_once_and_comes_back_from_the_cache(tmp_path, advml, empty_store):
    """Six stages of one model. The second time, nothing runs."""
    small = {"epochs": 1, "batch_size": 16}
    changes = {
        "grid.schemes": ["SL"],
        "grid.adversarial_regimes": [],
        "data.max_train": 60,
        "data.max_test": 40,
        "attack.steps": 1,
        "evaluate.steps": 1,
        **{f"pretrain.SL.{key}": value for key, value in small.items()},
        **{f"regimes.ST.{key}": value for key, value in small.items()},
    }
    root = repository(tmp_path / "repository", changes)
    shutil.copy(empty_store, root / "mlflow.db")
    first = advml("repro", "--jobs", "2", cwd=root)
    assert first.returncode == 0, first.stderr
    ran = {line.split()[1].rstrip(":") for line in first.stderr.splitlines() if line.startswith("[")}
    assert ran == set(grid(schemes=("SL",), adversarial=())) == set(YAML_FILE.load(root / "dvc.lock")["stages"])
    metrics = json.loads((root / "reports" / "SL-ST-s0" / "metrics.json").read_text())
    assert "6 stages ran" in first.stdout and f"{100 * metrics['accuracy/clean']:.1f} [" in first.stdout

    again = advml("repro", cwd=root)
    assert again.returncode == 0 and again.stdout.startswith("everything is up to date\n")
    weights = (root / "models" / "finetune" / "SL-ST-s0" / "model.safetensors").read_bytes()
    for folder in ("models", "reports", "records"):
        shutil.rmtree(root / folder)
    with Repo(root) as repo:
        repo.checkout()
        assert repo.reproduce() == []
        shown = repo.metrics.show()[""]["data"]
        assert shown["reports/SL-ST-s0/metrics.json"]["data"] == metrics
    assert (root / "models" / "finetune" / "SL-ST-s0" / "model.safetensors").read_bytes() == weights
