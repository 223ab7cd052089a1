"""What speaks against a model's figures reaches the record, and rests on the verdicts of the attacks that made them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advml import config
from advml.attacks.isolation import copied
from advml.attacks.pgd import evaluation_adversary
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.data.datasets import Dataset
from advml.evaluation import samples
from advml.evaluation.attack_suite import AttackSpec
from advml.evaluation.masking import diagnose
from advml.evaluation.masking.probes import probe
from advml.evaluation.metrics import survivors
from advml.evaluation.run_attacks import Scorer
from advml.evaluation.samples import Outcome

PARAMS = Path(__file__).parents[3] / "params.yaml"
CPU = Machine(torch.device("cpu"))
FIRST, ALL = 8, 40  # images that diagnostics look at, and test images


class Nearest(nn.Module):
    """Classifies by the nearest of the mean pictures of the classes: linear, right on every image, and honest about its gradients."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__()
        images, labels = dataset.train.images / 255, dataset.train.labels
        means = torch.stack([images[labels == label].mean(0).flatten() for label in labels.unique()])
        self.linear = nn.Linear(64, len(means))
        self.linear.weight.data, self.linear.bias.data = means, -means.square().sum(1) / 2

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


class Rounded(Nearest):
    """The same with rounded outputs, which have no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return (100 * super().forward(images)).round() / 100


def outcome(broken: set[int], rows: range | list[int] = range(ALL)) -> Outcome:
    nothing = torch.zeros(len(rows))
    right = torch.tensor([row not in broken for row in rows], dtype=torch.bool)
    return Outcome(torch.tensor(list(rows)), right, nothing.long(), nothing, nothing, nothing)


def outcomes(white: set[int], square: set[int] | None = None) -> dict[str, Outcome]:
    """Of an attack by gradients that has broken `white`, and of Square, aimed at the others."""
    found = {"accuracy/clean": outcome(set()), "accuracy/threat_model_2": outcome(white)}
    left = [row for row in range(ALL) if row not in white]
    return found if square is None else found | {"worst_case/square": outcome(square, left)}


def settings(*overrides: str) -> dict:
    found = config.load(PARAMS, [f"diagnostics.images={FIRST}", "diagnostics.steps=10", "diagnostics.shares=[1]", *overrides])
    adversary = evaluation_adversary(found.evaluate, found.threat_model)
    return {"spec": found.diagnostics, "threat_model": adversary.threat_model, "seed": found.evaluate.seed, "batch_size": 512}


def look(dataset: Dataset, network: nn.Module, found: dict[str, Outcome], *overrides: str, scorer: nn.Module | None = None) -> dict:
    decides = Scorer(scorer or copied(network), CPU)
    return diagnose.diagnose(network, decides, dataset.test, found, classes=4, **settings(*overrides))


def as_attacks(found: dict, before: dict[str, Outcome], *overrides: str) -> tuple[list[AttackSpec], dict[str, Outcome]]:
    asked = settings(*overrides)
    return diagnose.as_attacks(found, before, asked["spec"], asked["threat_model"])


def names(found: dict) -> list[str]:
    return [flag["name"] for flag in found["flags"]]


SMALL = "threat_model.epsilon=0.001"  # breaks nothing


@pytest.mark.parametrize("fails", [False, True], ids=["judged", "probes fail"])
def test_a_model_that_decides_itself_bears_a_flag_for_it(dataset, fails, monkeypatch):
    if fails:
        monkeypatch.setattr(diagnose, "probe", lambda *_, **__: raising(UserError("it fails")))
    network = Rounded(dataset)
    found = {
        who: names(look(dataset, network, outcomes(set()), "diagnostics.steps=2", SMALL, scorer=scorer))
        for who, scorer in {"copy": copied(network), "itself": network}.items()
    }
    assert found["itself"] == [*found["copy"], "not_copied"]


def raising(error: Exception):
    raise error


def test_the_record_holds_the_flags_and_the_evidence_they_rest_on(dataset):
    found = look(dataset, Rounded(dataset), outcomes(set()), "threat_model.epsilon=0.1", "evaluate.epsilon=0.002", "evaluate.seed=5")
    assert found == json.loads(json.dumps(found, allow_nan=False)) and set(found) == {"flags", "evidence", "broken"}
    assert "dead_gradients" in names(found) and all(set(flag) == {"name", "saw", "try"} for flag in found["flags"])
    evidence = found["evidence"]
    assert evidence["n"] == evidence["images"] == evidence["zero_clean"] == FIRST and evidence["classes"] == 4
    assert (evidence["epsilon"], evidence["norm"], evidence["steps"], evidence["seed"]) == (0.002, "linf", 10, 5)
    assert [point["epsilon"] for point in evidence["curve"]] == [0, 0.002, 1]


def test_an_honest_model_whose_attacks_have_done_their_work_has_no_flag(dataset):
    assert look(dataset, Nearest(dataset), outcomes(set(range(ALL))), "threat_model.epsilon=0.5")["flags"] == []


def test_a_figure_that_the_probes_undercut_is_flagged(dataset):
    assert names(look(dataset, Nearest(dataset), outcomes(set()), "threat_model.epsilon=0.5")) == ["figure_too_high"]


@pytest.mark.parametrize("square", [{2, 30}, None])
def test_square_is_an_attack_without_gradients_and_all_others_are_by_gradients(dataset, monkeypatch, square):
    given = {}

    def probe(*arguments, **options):
        given.update(options)
        raise UserError("that is enough")

    monkeypatch.setattr(diagnose, "probe", probe)
    look(dataset, Nearest(dataset), outcomes({0, 1}, square))
    assert given["white_box"].tolist() == [False, False, *[True] * (FIRST - 2)]
    told = {name: right.tolist() for name, right in given["black_box"].items()}
    assert told == ({"square": [False, False, False, *[True] * (FIRST - 3)]} if square else {})


def test_square_that_wins_on_the_first_images_is_flagged_once(dataset):
    found = look(dataset, Nearest(dataset), outcomes({0, 1}, {2, 3, 4, 20, 21}), SMALL)
    assert names(found) == ["black_box_stronger"] and "square 3 of 8" in found["flags"][0]["saw"]
    assert found["evidence"]["black_box"]["square"] == 3


@pytest.mark.parametrize(("count", "flagged"), [(0, []), (2, []), (3, ["black_box_stronger"])])
def test_square_that_wins_on_later_images_is_flagged_beyond_what_chance_makes_of_the_tolerance(dataset, count, flagged):
    found = look(dataset, Nearest(dataset), outcomes({0, 1}, set(range(20, 20 + count))), SMALL)
    assert names(found) == flagged and found["evidence"]["black_box"]["square"] == 0
    if flagged:
        assert "Square breaks 3 of 38 test images" in found["flags"][0]["saw"]


def test_square_that_comes_before_attacks_by_gradients_says_nothing_about_gradients(dataset):
    """They are not aimed at what it has broken."""
    found = outcomes({0, 1}, set(range(2, 12)))
    found["worst_case/apgd-ce"] = outcome(set(), list(range(12, ALL)))
    told = look(dataset, Nearest(dataset), found, SMALL)
    assert names(told) == [] and "square" not in told["evidence"]["black_box"]


def planted(monkeypatch, distances: list[float]) -> list:
    calls = []

    def distances_of(name, network, images, labels, *, norm, steps, seed):
        calls.append((name, len(images), len(labels), norm, steps, seed))
        return torch.tensor(distances), images

    monkeypatch.setattr(diagnose.minimum_norm, "minimal_distances", distances_of)
    return calls


MINIMAL = (
    "diagnostics.minimal=fmn",
    "diagnostics.minimal_steps=7",
    "threat_model.epsilon=0.5",
    "evaluate.epsilon=0.125",
    "evaluate.seed=3",
)
FAR = [0.2, 0.3, 2.0, float("inf")]


def test_minimal_distances_give_a_curve_beside_pgds(dataset, monkeypatch):
    calls = planted(monkeypatch, [0.0, 0.125, 0.126, 0.5, *FAR])
    found = look(dataset, Nearest(dataset), outcomes(set(range(ALL))), *MINIMAL)
    assert calls == [("fmn", FIRST, FIRST, "linf", 7, 3)]
    minimal, pgd = found["minimal"], [point["accuracy"] for point in found["evidence"]["curve"]]
    assert minimal["curve"] == [
        {"epsilon": 0.0, "accuracy": 7 / 8, "pgd": pgd[0]},
        {"epsilon": 0.125, "accuracy": 6 / 8, "pgd": pgd[1]},
        {"epsilon": 1.0, "accuracy": 2 / 8, "pgd": pgd[2]},
    ]
    assert minimal["distances"] == pytest.approx([0.0, 0.125, 0.126, 0.5, 0.2, 0.3, 2.0, None])
    assert (minimal["attack"], minimal["library"], minimal["steps"], minimal["n"]) == ("fmn", "foolbox", 7, FIRST)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("distances", "white", "flagged"),
    [
        ([0.125, 0.1, 0.13, 0.4], {6, 7}, True),
        ([0.125, 0.13, 0.13, 0.4], {6, 7}, False),  # one of eight: luck
        ([0.125, 0.1, 0.1, 0.1], {0, 1, 2}, False),  # all but one are broken already
    ],
)
def test_nearer_examples_of_images_that_survive_are_flagged(dataset, monkeypatch, distances, white, flagged):
    planted(monkeypatch, [*distances, *FAR])
    found = look(dataset, Nearest(dataset), outcomes(white), *MINIMAL)
    assert ("minimal_stronger" in names(found)) is flagged
    if flagged:
        assert "fmn breaks, within 0.125, 2 of 8 samples" in found["flags"][-1]["saw"]


def test_images_that_square_has_broken_do_not_survive_all_attacks(dataset, monkeypatch):
    planted(monkeypatch, [0.1, 0.1, 0.1, 0.4, *FAR])
    assert "minimal_stronger" not in names(look(dataset, Nearest(dataset), outcomes({6, 7}, {0, 1, 2}), *MINIMAL))


def test_nobody_looks_for_minimal_distances_unasked(dataset, monkeypatch):
    calls = planted(monkeypatch, [])
    assert "minimal" not in look(dataset, Nearest(dataset), outcomes(set()), SMALL) and not calls


def test_foolbox_finds_the_boundary_of_a_linear_model(dataset):
    network = Nearest(dataset)
    found = look(dataset, network, outcomes(set(range(ALL))), "diagnostics.minimal=fmn", "threat_model.epsilon=0.2")
    images, labels = dataset.test.images[:FIRST] / 255, dataset.test.labels[:FIRST]
    with torch.no_grad():
        behind = network(images).gather(1, labels[:, None]) - network(images)
        weight = network.linear.weight
        nearest = (behind / (weight[labels][:, None] - weight).abs().sum(2)).nan_to_num(nan=torch.inf).amin(1)  # but for the box
    distances = torch.tensor(found["minimal"]["distances"])
    assert (distances > nearest - 1e-4).all() and (distances < 1.15 * nearest).all()
    assert found["flags"] == [] and found["minimal"]["curve"][0]["accuracy"] == 1


def test_a_model_that_fails_on_the_probes_is_not_judged_but_for_what_needs_none(dataset):
    class Picky(Nearest):
        def forward(self, images: Tensor) -> Tensor:
            raise ValueError("not today\nnor tomorrow")

    found = look(dataset, Picky(dataset), outcomes(set(), {20, 21, 22, 23}))
    assert set(found) == {"flags", "skipped"} and names(found) == ["black_box_stronger"]
    assert found["skipped"] == "the model fails on a batch of 8x1x8x8 images: ValueError: not today"


# What diagnostics break counts


def test_what_the_probes_break_is_broken_in_the_worst_case(dataset):
    network, before, wide = Nearest(dataset), outcomes({0, 1}), "threat_model.epsilon=0.5"
    found = json.loads(json.dumps(look(dataset, network, before, wide, scorer=network)))
    figures, steps = as_attacks(found, before, wide)
    assert list(steps) == [figure.name for figure in figures] == [f"worst_case/probe-{kind}" for kind in ("pgd", "step", "noise")]
    left = survivors(before | steps)
    assert left[:FIRST].sum() == 0 and left[FIRST:].all()
    first = steps["worst_case/probe-pgd"]
    assert first.rows.tolist() == [2, 3, 4, 5, 6, 7] and not steps["worst_case/probe-step"].rows.numel()
    assert (first.predicted != dataset.test.labels[2:8]).all() and (first.distance <= 0.5 + 1e-5).all() and (first.distance > 0).all()
    assert found["evidence"]["figure_broken"] == 6 and figures[0].settings["epsilon"] == 0.5
    table = samples.table(before | steps, dataset.test, about={}).to_pylist()
    assert [row["broken_by"] for row in table[:4]] == ["threat_model_2", "threat_model_2", "probe-pgd", "probe-pgd"]
    assert table[3]["distance"] == pytest.approx(float(first.distance[1])) and table[20]["broken_by"] is None


def test_what_the_scorer_sees_otherwise_does_not_count(dataset):
    class Wise(Nearest):
        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(dataset.test.labels[:1].expand(len(images)), 4).float()

    before, changes = outcomes(set()), ("diagnostics.images=1", "threat_model.epsilon=0.5")
    found = look(dataset, Nearest(dataset), before, *changes, scorer=Wise(dataset))
    assert survivors(before | as_attacks(found, before, *changes)[1]).all() and found["evidence"]["broken"] == 1


def test_nearest_images_within_epsilon_count_and_others_do_not(dataset, monkeypatch):
    wrong = dataset.test.labels
    distances = torch.tensor([0.0, 0.125, 0.126, 0.5, *FAR])

    class Scoring(nn.Module):
        def forward(self, images: Tensor) -> Tensor:  # everything that it is shown is of another class
            return torch.nn.functional.one_hot((wrong[1:2] + 1) % 4, 4).float().expand(len(images), -1)

    monkeypatch.setattr(diagnose.minimum_norm, "minimal_distances", lambda name, network, images, *rest, **how: (distances, images))
    monkeypatch.setattr(diagnose, "probe", lambda *arguments, on_broken, **how: probe(*arguments, **how))
    monkeypatch.setattr(diagnose, "PROBES", {})
    before = outcomes(set())
    found = look(dataset, Nearest(dataset), before, "diagnostics.steps=2", *MINIMAL, scorer=Scoring())
    assert list(found["broken"]) == ["fmn"] and found["broken"]["fmn"]["rows"] == [1]
    assert as_attacks(found, before, *MINIMAL)[1]["worst_case/fmn"].right.tolist() == [True, False, *[True] * 6]
