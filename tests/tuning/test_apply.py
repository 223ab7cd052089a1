"""`advml tune apply`: a proposal becomes a reviewable difference, and comments stay."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from advml import config
from advml.config.presets import preset
from advml.config.rewrite import merge
from advml.core.errors import UserError
from advml.core.paths import Workspace
from advml.tuning.apply import proposal, warnings

PARAMS = preset("digits", full=True)  # every key in a line of its own


@pytest.fixture
def params(tmp_path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS, encoding="utf-8")
    return path


def propose(root: Path, name: str, text: str) -> None:
    folder = root / "reports" / "tune" / name
    folder.mkdir(parents=True)
    (folder / "best.yaml").write_text(text)


def changed_lines(difference: str) -> list[str]:
    return [line for line in difference.splitlines() if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))]


def test_only_the_proposed_lines_change_and_comments_stay(params):
    values = {"regimes.Full-AT.learning_rate": 0.0031, "evaluate.schedule": "linear", "views.contrastive.shift": 0.2}
    merged = merge(params, values)
    after, difference = merged.text, merged.difference
    assert len(changed_lines(difference)) == 2 * 3 and merged.changes == values
    assert "+  schedule: linear" in difference and "# of the step size: constant, linear, cosine" in difference
    assert sum("#" in line for line in after.splitlines()) == sum("#" in line for line in PARAMS.splitlines())
    params.write_text(after)
    loaded = config.flatten(config.load(params).model_dump())
    assert {key: loaded[key] for key in values} == values
    assert (merge(params, values).difference, merge(params, values).changes) == ("", {})


def test_an_option_that_was_not_written_out_is_added(params):
    params.write_text(preset("digits"), encoding="utf-8")
    params.write_text(merge(params, {"views.contrastive.contrast": 0.4}).text)
    assert config.load(params).views.contrastive.contrast == 0.4 and config.load(params).views.contrastive.rotation == 20


def test_a_proposal_that_no_longer_fits_is_refused_and_nothing_written(params):
    before = params.read_text()
    with pytest.raises(UserError, match="warmup"):
        merge(params, {"regimes.Full-AT.warmup": 0.2})
    with pytest.raises(UserError, match=r"unknown key 'regimes\.Half-AT'"):
        merge(params, {"regimes.Half-AT.epochs": 2})
    assert params.read_text() == before


def test_a_missing_or_damaged_proposal_is_one_line(tmp_path):
    for name, command in (
        ("attack-CL-AT-s0", "attack CL-AT-s0"),
        ("finetune-CLxSL-Full-AT-s0", "finetune CLxSL Full-AT"),
        ("pretrain-CL-at-s3-pareto", "pretrain CL at --seed 3 --pareto"),
        ("x", "attack|finetune|pretrain ... --name x"),
    ):
        with pytest.raises(UserError, match=rf"'{name}'.*: advml tune {re.escape(command)}$"):
            proposal(Workspace(tmp_path), name)
    propose(tmp_path, "good", "parameters: {evaluate.steps: 5}\n")
    propose(tmp_path, "bad", "parameters: [\n")
    propose(tmp_path, "empty", "")
    assert proposal(Workspace(tmp_path), "good") == {"evaluate.steps": 5}
    with pytest.raises(UserError, match="choose from bad, empty, good"):
        proposal(Workspace(tmp_path), "x")
    for name in ("bad", "empty"):
        with pytest.raises(UserError, match="is damaged"):
            proposal(Workspace(tmp_path), name)


def test_the_command_prints_the_difference_and_writes_unless_told_not_to(params, tmp_path, advml):
    propose(tmp_path, "found", "parameters: {regimes.Full-AT.epochs: 12}\n")
    before = params.read_text()
    dry = advml("tune", "apply", "found", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0 and "+    epochs: 12" in dry.stdout and "nothing written" in dry.stdout
    assert params.read_text() == before
    done = advml("tune", "apply", "found", cwd=tmp_path)
    assert done.returncode == 0 and "next: advml repro" in done.stdout
    assert config.load(params).regimes["Full-AT"].epochs == 12
    assert "already" in advml("tune", "apply", "found", cwd=tmp_path).stdout
    wrong = advml("tune", "apply", "lost", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("advml: there is no proposal 'lost'")


def test_what_a_proposed_attack_changes_elsewhere_is_said(params, tmp_path, advml):
    propose(tmp_path, "attack", "trial: 3\nparameters: {evaluate.steps: 5, evaluate.step_size: 0.05, evaluate.restarts: 4}\n")
    told = advml("tune", "apply", "attack", "--dry-run", cwd=tmp_path).stdout.splitlines()
    said = [line for line in told if line.startswith("warning: ")]
    assert len(said) == 2
    assert said[0].startswith("warning: evaluate.steps = 5 is also the number of steps of pgd-margin in worst_case")
    assert said[1].startswith("warning: evaluate.step_size = 0.05 is an absolute length") and "half of epsilon" in said[1]
    unchanged = {"evaluate.steps": 20, "evaluate.restarts": 2}
    assert not warnings(merge(params, unchanged).changes)
    with pytest.raises(UserError, match=r"^attack proposes only trial 3"):
        proposal(Workspace(tmp_path), "attack", trial=4)


def test_the_difference_holds_no_line_that_is_the_same_and_patch_can_apply_it(params, tmp_path):
    """A whole fine-tuning: many lines of one section, like those of other sections, far beyond difflib's 200 lines."""
    given = config.load(params).regimes["Full-AT"]
    values = {"learning_rate": 0.0031, "epochs": 14, "loss": "trades", "adversarial_weight": 3.5, "label_smoothing": 0.07, "epsilon": 0.2}
    assert all(getattr(given, key) != value for key, value in values.items())
    merged = merge(params, {f"regimes.Full-AT.{key}": value for key, value in values.items()})
    lines = changed_lines(merged.difference)
    removed, added = ([line[1:] for line in lines if line[0] == sign] for sign in "-+")
    assert len(removed) == len(added) == len(values) and not set(removed) & set(added)
    patched = subprocess.run(
        ["git", "apply", "--unidiff-zero", "-p0", "-"],
        input=merged.difference.replace(f"{params}", "params.yaml").replace("params.yaml (proposed)", "params.yaml"),
        text=True,
        cwd=tmp_path,
        capture_output=True,
    )
    assert patched.returncode == 0, patched.stderr
    assert params.read_text() == merged.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"regimes.Full-AT.epochs": 12, "regimes.Full-AT.learning_rate": 0.1}, ["regimes.Full-AT is used for every scheme of the grid"]),
        ({"pretrain.CL.learning_rate": 0.1, "temperature": 0.3}, ["pretrain.CL is used in both", "temperature = 0.3 is used for every"]),
        ({"views.contrastive.rotation": 9, "views.contrastive.shift": 0.1}, ["views.contrastive is used for every contrastive scheme"]),
        ({"evaluate.restarts": 4}, []),
    ],
)
def test_what_counts_for_more_than_was_searched_is_said_once(changes, said):
    found = warnings(changes)
    assert len(found) == len(said) and all(line.startswith(f"warning: {start}") for line, start in zip(found, said, strict=True))
