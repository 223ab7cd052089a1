"""A search: a parent run, and nested in it a run per trial."""

from __future__ import annotations

import functools

import pytest

from advml import tracking
from advml.tracking import Trial
from advml.tracking.results import winner


@pytest.fixture
def open_search(project):
    tags, params = {"search": "attack", "model": "CL-AT-s0"}, {"tune": {"attack": {"trials": 8}}}
    return functools.partial(tracking.open_search, project.place, name="attack", identity="i", tags=tags, params=params)


def nested(project, run) -> dict:
    """The runs of the trials by name."""
    found = project.store.client.search_runs([project.store.experiment], f"tags.`mlflow.parentRunId` = '{run.id}'")
    return {one.info.run_name: one for one in found}


def test_trials_are_nested_runs_that_end_as_the_trials_did(project, open_search):
    history = [{"epoch": 1, "robust": 0.4}, {"epoch": 2, "robust": 0.5}]
    with open_search() as run:
        run.show([Trial(0, "running", {"steps": 5})])
        assert nested(project, run)["attack/0"].info.status == "RUNNING"
        ended = [Trial(0, "complete", {"steps": 5}, {"robust": 0.5}, history), Trial(1, "failed", {}, reason="out of memory")]
        times = []
        for _ in range(2):
            run.show([*ended, Trial(2, "killed", {}), Trial(3, "pruned", {})])
            times.append(nested(project, run)["attack/0"].info.end_time)
        assert times[0] == times[1]
        run.mark_best(0)
        run.mark_best(3)
    found = nested(project, run)
    ends = {name: one.info.status for name, one in found.items()}
    assert ends == {"attack/0": "FINISHED", "attack/1": "FAILED", "attack/2": "KILLED", "attack/3": "FINISHED"}
    first = found["attack/0"]
    assert first.data.params == {"steps": "5"} and first.data.metrics == {"robust": 0.5}
    assert sorted(project.steps(first.info.run_id, "robust")) == [0, 1, 2]  # what it scored, and the curve
    tags = {"advml.kind": "trial", "advml.trial": "0", "advml.search": "attack", "advml.state": "complete"}
    assert tags.items() <= first.data.tags.items()
    assert found["attack/1"].data.tags["mlflow.note.content"] == "out of memory"
    assert [name for name, one in found.items() if "advml.best" in one.data.tags] == ["attack/3"]
    parent = project.entity(run.id)
    about = {"advml.kind": "search", "advml.model": "CL-AT-s0", "advml.study": "i", "advml.best_trial": "3"}
    assert about.items() <= parent.data.tags.items() and parent.data.params == {"tune.attack.trials": "8"}


def test_a_later_command_goes_on_with_the_runs_of_its_study(project, open_search, monkeypatch):
    with open_search() as first:
        first.show([Trial(0, "complete", {}, {"robust": 0.5}), Trial(1, "running", {}), Trial(2, "running", {})])
    client = type(project.store.client)
    monkeypatch.setattr(client, "search_runs", functools.partialmethod(client.search_runs, max_results=2))  # pages of two
    with open_search() as run:
        assert run.id == first.id and project.entity(run.id).info.status == "RUNNING"
        run.show([Trial(0, "complete", {}, {"robust": 0.5}), Trial(1, "complete", {}), Trial(2, "complete", {})])
    monkeypatch.undo()
    assert {name: one.info.status for name, one in nested(project, run).items()} == {f"attack/{i}": "FINISHED" for i in range(3)}
    with open_search(identity="another") as other:
        assert other.id != run.id


def test_files_and_scores_are_logged_as_sync_would(project, open_search):
    folder = project.root / "reports" / "tune" / "attack"
    folder.mkdir(parents=True)
    (folder / "best.yaml").write_text("parameters: {attack.steps: 5}\nscored: {robust: 0.57}\n")
    (folder / "trials.csv").write_text("trial,state,robust\n0,complete,0.57\n")
    with open_search() as run:
        run.log_results(folder, [folder / "best.yaml", folder / "trials.csv"])
        (folder / "best.yaml").write_text("scored: {robust: 0.53}\n")
        assert project.sync() == []  # the command is at work, and logs it itself
    record = project.entity(run.id)
    assert record.data.metrics == {"best/robust": 0.57}
    assert project.artifacts(run.id, "tune") == {"tune/best.yaml", "tune/trials.csv", "tune/trials.json"}
    assert project.sync() == ["attack"] and project.sync() == []
    assert project.newest("attack").info.run_id == run.id and project.newest("attack").data.metrics == {"best/robust": 0.53}


PAIRED = {"p": 0.01, "difference": -0.1, "low": -0.2, "high": 0}
ATTACK = {"test": {"winner": {"accuracy": 0.5}, "default": {"accuracy": 0.6}, "paired": PAIRED}}
MEANS = {"winner": {"robust": {"mean": 0.8}}, "default": {"robust": {"mean": 0.7}}}
TRAINING = {"confirmed": {"test": MEANS | {"difference": {"robust": {"mean": 0.1, "low": 0.05, "high": 0.15}}}}}


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (ATTACK, {"winner": 0.5, "default": 0.6} | PAIRED),
        (TRAINING, {"winner": 0.8, "default": 0.7, "difference": 0.1, "low": 0.05, "high": 0.15}),
        ({}, {}),
    ],
    ids=["attack", "training", "not confirmed"],
)
def test_winner_and_default_are_compared_on_test(measured, expected):
    found = winner({"scored": {"robust": 0.57}} | measured)
    assert found == {"best/robust": 0.57} | {f"test/{key}": value for key, value in expected.items()}
