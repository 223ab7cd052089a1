"""What trainings took: of all phases behind a model, of the weights that are meant, and nothing where something is unknown."""

from __future__ import annotations

import json

import pytest

from advml.core.paths import Workspace
from advml.core.training_cost import SECONDS, STEPS, cost_of, training_cost, write_seconds

PRETRAINED = {"name": "CL-at-s0", "digest": "p", "gradient_steps": 280.0}
MODEL = {"name": "CL-AT-s0", "digest": "m", "gradient_steps": 50.5, "pretraining": PRETRAINED}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    write_seconds(Workspace(tmp_path), "CL-at-s0", digest="p", seconds=60.25)
    write_seconds(Workspace(tmp_path), "CL-AT-s0", digest="m", seconds=2.5)
    return Workspace(tmp_path)


def test_pretraining_and_fine_tuning_add_up(workspace):
    assert training_cost(workspace, MODEL) == {STEPS: 330.5, SECONDS: 62.75}
    assert training_cost(workspace, PRETRAINED) == {STEPS: 280.0, SECONDS: 60.25}


def test_seconds_of_other_weights_do_not_count(workspace):
    write_seconds(workspace, "CL-at-s0", digest="other", seconds=1.0)
    assert training_cost(workspace, MODEL) == {STEPS: 330.5}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": "p"}', '{"digest": "p", "seconds": "long"}'])
def test_a_damaged_note_counts_as_none(workspace, content):
    (workspace.report("CL-at-s0") / "seconds.json").write_text(content)
    assert training_cost(workspace, MODEL) == {STEPS: 330.5}


def test_a_model_of_an_older_version_has_no_steps(workspace):
    del (older := json.loads(json.dumps(MODEL)))["pretraining"]["gradient_steps"]
    assert training_cost(workspace, older) == {SECONDS: 62.75}
    assert cost_of(workspace, "CL-AT-s0") == {}  # there is no model.json
