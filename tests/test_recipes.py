"""The tables of the paper, and that a row is all that a new scheme or regime takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest
import torch
from ruamel.yaml import YAML

from advml.config import OF_THE_ATTACK, WITHOUT_EFFECT, Grid
from advml.recipes import REGIMES, SCHEMES, RegimeName, SchemeName, classes, instances

REPOSITORY = Path(__file__).parents[1]
PIPELINE = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def test_the_names_to_choose_from_are_the_rows():
    assert get_args(SchemeName) == tuple(SCHEMES) and get_args(RegimeName) == tuple(REGIMES)
    assert all(name == row.name for name, row in (SCHEMES | REGIMES).items())
    assert not any("-" in name for name in SCHEMES)


def test_images_of_a_group_are_positives_of_each_other():
    labels = torch.tensor([3, 3, 1])
    assert len(instances(labels).unique()) == 3 and instances(labels).dtype == torch.int64
    assert classes(labels) is labels


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_a_regime_stands_in_the_grid_by_its_pretraining_and_its_stage_knows_its_attack(regime):
    """Otherwise DVC would take a model for up to date after its attack has changed."""
    lists = {"st": "standard_regimes", "at": "adversarial_regimes"}
    listed = {phase: get_args(get_args(Grid.model_fields[key].annotation)[0]) for phase, key in lists.items()}
    assert [phase for phase, names in listed.items() if regime.name in names] == [regime.pretraining]
    assert not regime.attacked or {"threat_model", "attack"} <= set(PIPELINE[f"finetune_{regime.pretraining}"]["params"])


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_keys_that_a_regime_has_no_use_for_are_refused(regime):
    idle = {*(() if regime.attacked else OF_THE_ATTACK), *(() if regime.encoder_learns else ("layer_decay", "frozen_statistics"))}
    idle |= {"attacked", "views", "view_annealing"}
    assert set(WITHOUT_EFFECT[f"regimes.{regime.name}"]) == idle


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_keys_that_a_pretraining_has_no_use_for_are_refused(scheme):
    idle = {"frozen_statistics", "averaged_crops"} | (set() if "classifier" in scheme.heads else {"label_smoothing", "loss"})
    idle |= set() if scheme.groups else {"views"}
    assert set(WITHOUT_EFFECT[f"pretrain.{scheme.name}"]) == idle


SCHEME, REGIME = "PCL", "ST-Full-AT"
COMMANDS = f"""
    from matplotlib.figure import Figure
    from advml.cli import app
    Figure.draw = lambda *_: None  # takes longer than all the training
    tune = ["tune", "finetune", "{SCHEME}", "{REGIME}", "--trials", "1", "-S", "tune.finetune.space={{epochs: {{int: [1, 2]}}}}"]
    tune += ["-S", "tune.finetune.confirm=0", "-S", "tune.finetune.clean_floor=0"]
    model = ["{SCHEME}", "{REGIME}"]
    for command in (["check"], ["train", *model], ["represent", *model], tune, ["report"], ["show", "{SCHEME}-{REGIME}-s0"]):
        app(args=command, standalone_mode=False)
"""


def test_scheme_and_regime_of_the_documents_are_trained_evaluated_represented_tuned_and_reported(make_study, tmp_path):
    """Their rows, on a copy of the sources, and their sections of params.yaml, with three views and free steps; nothing else is edited."""
    text = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    rows = {name: re.search(rf'^ +("{name}": .*)$', text, re.MULTILINE)[1] for name in (SCHEME, REGIME)}
    parity = textwrap.dedent(re.search(r"^ +def parity.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)[0])
    package = Path(shutil.copytree(REPOSITORY / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))) / "advml"
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    recipes = (package / "recipes.py").read_text(encoding="utf-8")
    for before, name in (("SCL", SCHEME), ("Full-AT", REGIME)):
        recipes = re.sub(rf'(?m)^    "{before}": .*$', rf"\g<0>\n    {rows[name]}", recipes)
    recipes = recipes.replace("SCHEMES: dict", f"{parity}\n\n\nSCHEMES: dict")
    (package / "recipes.py").write_text(recipes, encoding="utf-8")
    small = ("similarity.layers=blocks", "similarity.probe_strengths=[0.1]")
    study = make_study("study", "worst_case.attacks=[]", "corruptions.names=none", "diagnostics.images=0", *small)
    values = YAML(typ="safe").load(study.params)
    values["pretrain"] = {SCHEME: values["pretrain"]["SCL"] | {"views": 3}}
    values["regimes"] = {REGIME: values["regimes"]["Full-AT"] | {"averaged_crops": 5}}
    values["attack"]["kind"] = "free"
    values["grid"] = {"schemes": [SCHEME], "standard_regimes": [REGIME], "adversarial_regimes": []}
    YAML(typ="safe").dump(values, study.params)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMANDS)],
        cwd=study.root,
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    name, space = f"{SCHEME}-{REGIME}-s0", study.workspace
    model = json.loads((space.model(name) / "model.json").read_text())
    assert model["pretraining"]["name"] == f"{SCHEME}-st-s0" and {"threat_model", "attack"} <= model["parameters"].keys()
    assert model["architecture"]["averaged_crops"] == 5 and model["gradient_steps"] == 2 * 5  # one pass, two replays, five crops
    assert {"accuracy/threat_model_2", "cka/redundancy"} <= json.loads((space.report(name) / "metrics.json").read_text()).keys()
    best = (space.reports / "tune" / f"finetune-{name}" / "best.yaml").read_text()
    assert f"regimes.{REGIME}.epochs" in best
    page = (space.reports / "report.html").read_text()
    assert "PCL parity contrastive" in page and "standard pretraining, adversarial fine-tuning of encoder and head" in page
    summary = (space.reports / "summary.csv").read_text()
    assert name in summary and name in page and {"cost/gradient_steps", "cost/seconds"} <= set(summary.splitlines()[0].split(","))
    assert name in done.stdout
