"""Accuracies count every image once, the worst case is per sample, and records tell how they were made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from advml import config
from advml.evaluation.intervals import wilson
from advml.evaluation.metrics import describe, describe_kept, metrics, survivors
from advml.evaluation.samples import Outcome

PARAMS = Path(__file__).parents[2] / "params.yaml"


def configuration(*overrides: str) -> config.Config:
    return config.load(PARAMS, overrides)


def outcome(right: list[bool], rows: list[int] | None = None, *, backward: float = 2.0) -> Outcome:
    nothing = torch.zeros(len(right))
    places = torch.tensor(rows if rows is not None else range(len(right)))
    return Outcome(places, torch.tensor(right, dtype=torch.bool), nothing.long(), nothing, nothing + 3, nothing + backward)


CLEAN = outcome([True, True, True, False], backward=0.0)
FOUND = {
    "accuracy/clean": CLEAN,
    "accuracy/threat_model_2": outcome([False, True, True, False]),
    "worst_case/pgd-margin": outcome([True, False], [1, 2]),
    "worst_case/square": outcome([True], [1]),
}


def test_metrics_have_the_contracts_names_and_the_worst_case_is_per_sample():
    flat, ends = metrics(FOUND), {}
    for name, correct in {"accuracy/clean": 3, "accuracy/threat_model_2": 2, "accuracy/worst_case": 1}.items():
        low, high = wilson(correct, 4)
        ends |= {name: correct / 4, f"{name}/low": low, f"{name}/high": high}
    assert flat == ends


def test_an_image_that_two_attacks_break_in_turn_counts_for_neither_twice():
    """Never the minimum of accuracies: here each attack alone leaves 3 of 4, together they leave 2."""
    clean = outcome([True] * 4)
    found = {"accuracy/clean": clean, "accuracy/a": outcome([False, True, True, True]), "accuracy/b": outcome([True, False, True, True])}
    assert survivors(found).tolist() == [False, False, True, True] and metrics(found)["accuracy/worst_case"] == 0.5
    assert clean.right.all()


def test_the_record_holds_every_hyperparameter_and_seed_of_the_attack(suite):
    settings = configuration("evaluate.restarts=3", "threat_model.epsilon=0.2", "evaluate.steps=10", "worst_case.attacks=[]")
    attacks = suite(settings, "CL", note="old head")
    found = {attack.name: outcome([True, True, False]) for attack in attacks}
    records = describe(attacks, found, seed=7, batch_size=64)
    assert records["accuracy/clean"] == {"n": 3, "correct": 2, "interval": list(wilson(2, 3))}
    assert records["accuracy/threat_model_1"] == {
        **{"n": 3, "correct": 2, "interval": list(wilson(2, 3)), "attack": "pgd", "objective": "contrastive"},
        **{"norm": "linf", "epsilon": 0.2, "box": [0, 1], "steps": 10, "step_size": pytest.approx(0.05), "random_start": True},
        **{"keep": "best", "mode": "eval", "momentum": 0.0, "schedule": "constant", "note": "old head"},
        **{"restarts": 3, "seed": 7, "batch_size": 64, "forward": 9, "backward": 6},
    }
    second = records["accuracy/threat_model_2"]
    assert second["objective"] == "cross-entropy" and "note" not in second
    kept = describe_kept(next(attack for attack in attacks if attack.kept), 2, seed=7, batch_size=64)
    same = second.keys() & kept.keys() - {"n", "restarts"}
    assert (kept["n"], kept["restarts"]) == (2, 1) and all(kept[key] == second[key] for key in same) and "correct" not in kept


@pytest.fixture
def worst_case(suite):
    def record(*overrides: str) -> dict:
        listed = suite(configuration("worst_case.attacks=[pgd-margin, square]", *overrides))
        return describe([attack for attack in listed if attack.name in FOUND], FOUND, seed=0, batch_size=512)["accuracy/worst_case"]

    return record


def test_the_record_of_the_worst_case_tells_what_each_attack_was_aimed_at_broke_and_cost(worst_case):
    record = worst_case("worst_case.restarts=3", "worst_case.queries=77")
    steps = record.pop("cascade")
    assert record == {
        **{"n": 4, "correct": 1, "interval": list(wilson(1, 4)), "attack": "cascade", "norm": "linf", "box": [0, 1]},
        **{"epsilon": configuration().threat_model.epsilon, "seed": 0, "batch_size": 512, "forward": 21, "backward": 14},
    }
    told = [(step["name"], step["aimed_at"], step["broke"], step["restarts"], step["forward"]) for step in steps]
    assert told == [("threat_model_2", 4, 1, 1, 12), ("pgd-margin", 2, 1, 3, 6), ("square", 1, 0, 1, 3)]
    assert steps[1]["objective"] == "margin" and steps[2]["queries"] == 77 and steps[2]["library"] == "pyautoattack"


def test_the_record_of_the_worst_case_holds_the_radius_of_the_attacks_not_that_of_training(worst_case):
    record = worst_case("threat_model.epsilon=0.3", "evaluate.epsilon=0.1")
    assert [record["epsilon"], *(step["epsilon"] for step in record["cascade"])] == [0.1] * 4
