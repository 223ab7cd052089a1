"""Accuracies count every image once, an image survives only if it survives every restart, and intervals are Wilson's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from advml import config
from advml.attacks import autoattack
from advml.attacks.adversary import evaluation_adversary
from advml.attacks.draws import PerImage
from advml.attacks.threat import ThreatModel
from advml.data.datasets import Split
from advml.evaluation.accuracy import attacked, describe, describe_worst, effort, metrics, survivors
from advml.evaluation.intervals import wilson
from advml.evaluation.measure import Effort, Outcome, measure
from advml.evaluation.plan import cascade, figures, plan
from advml.networks.models import Architecture, build
from advml.recipes import SCHEMES
from advml.runtime.machine import Machine, derived_seed
from advml.training.objectives import contrastive_pair, cross_entropy, margin

PARAMS = Path(__file__).parents[2] / "params.yaml"
ARCHITECTURE = Architecture("test_resnet", "small", {}, 1, 8, (0.4,), (0.3,), 10, 16, False, False)
CPU = Machine(torch.device("cpu"))


def configuration(*overrides: str) -> config.Config:
    return config.load(PARAMS, overrides)


# Intervals


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 360), (360, 360), (1, 360), (270, 360), (9984, 10000)])
def test_wilson_equals_scipys(successes, n):
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_stays_within_0_and_1_and_holds_the_share():
    for successes in range(21):
        low, high = wilson(successes, 20)
        assert 0 <= low <= successes / 20 <= high <= 1


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


# What is measured


def test_a_contrastive_scheme_is_measured_under_both_threat_models_at_two_epsilons():
    listed = {figure.name: figure for figure in figures(configuration("threat_model.epsilon=0.3"), SCHEMES["CL"], note="old head")}
    assert list(listed) == [
        "accuracy/clean",
        "accuracy/threat_model_1",
        "accuracy/threat_model_2",
        "accuracy/threat_model_1_half",
        "accuracy/threat_model_2_half",
    ]
    for name, epsilon in {"": 0.3, "_half": 0.15}.items():
        first, second = (listed[f"accuracy/threat_model_{number}{name}"] for number in (1, 2))
        assert first.threat_model == second.threat_model == ThreatModel("linf", epsilon)
        assert first.coupled and not second.coupled and first.settings["note"] == "old head" and "note" not in second.settings
    assert [name for name, figure in listed.items() if figure.kept] == ["accuracy/threat_model_2"]


def test_the_supervised_scheme_has_no_threat_model_1():
    names = [figure.name for figure in figures(configuration(), SCHEMES["SL"])]
    assert names == ["accuracy/clean", "accuracy/threat_model_2", "accuracy/threat_model_2_half"]


def test_without_a_scheme_there_is_no_threat_model_1():
    assert [figure.name for figure in figures(configuration(), None)] == [figure.name for figure in figures(configuration(), SCHEMES["SL"])]


def test_the_cascade_holds_the_attacks_in_the_order_of_params_yaml_as_far_as_there_are_enough_classes():
    names = ["pgd-margin", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert [figure.name for figure in cascade(configuration(), classes=10)] == [f"worst_case/{name}" for name in names]
    assert [figure.name for figure in cascade(configuration(), classes=3)] == [f"worst_case/{name}" for name in names if name != "apgd-t"]
    some = cascade(configuration("worst_case.attacks=[square, pgd-margin]", "worst_case.restarts=4"), classes=10)
    assert [figure.name for figure in some] == ["worst_case/square", "worst_case/pgd-margin"] and all(figure.left_only for figure in some)
    assert some[1].restarts == 4 and some[1].settings["random_start"]
    assert cascade(configuration("worst_case.attacks=[]"), classes=10) == []


@pytest.mark.parametrize(
    ("objective", "attacks", "names"),
    [
        ("ce", "[square]", ["pgd-margin", "square"]),
        ("margin", "[square]", ["pgd-ce", "square"]),
        ("dlr", "[square]", ["pgd-ce", "pgd-margin", "square"]),
        ("dlr", "[square, pgd-margin]", ["pgd-ce", "square", "pgd-margin"]),
        ("margin", "[]", []),
    ],
)
def test_pgd_on_cross_entropy_and_on_the_margin_are_always_in_the_worst_case(objective, attacks, names):
    found = cascade(configuration(f"evaluate.objective={objective}", f"worst_case.attacks={attacks}"), classes=10)
    assert [figure.name for figure in found] == [f"worst_case/{name}" for name in names]
    own = {figure.name: figure for figure in found if "objective" in figure.settings}
    said = {"worst_case/pgd-ce": "cross-entropy", "worst_case/pgd-margin": "margin"}
    assert all(figure.settings["objective"] == said[name] and figure.restarts == 3 for name, figure in own.items())


EXPECTED = {
    "accuracy/threat_model_1": lambda x, moved, y, net: contrastive_pair(
        net.embed(x), net.embed(moved), y, temperature=configuration().temperature
    ),
    "accuracy/threat_model_2": lambda x, moved, y, net: cross_entropy(net(moved), y),
    "worst_case/pgd-margin": lambda x, moved, y, net: margin(net(moved), y),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_figure_ascends_its_own_objective(name):
    """The attack of the plan against the adversary of params.yaml on the objective of the methods, written out."""
    network, settings = build(ARCHITECTURE, seed=0).eval(), configuration("evaluate.steps=3")
    images, labels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 2, 1, 5])
    (figure,) = (figure for figure in plan(settings, SCHEMES["SCL"], classes=10) if figure.name == name)
    adversary = evaluation_adversary(settings, epsilon=settings.threat_model.epsilon)
    wanted = adversary.attack(network, lambda: lambda moved: EXPECTED[name](images, moved, labels, network), images, generator=PerImage(9))
    assert torch.allclose(figure.craft(network, images, labels, PerImage(9)), wanted, atol=1e-6)
    others = [other for other in EXPECTED if other != name]
    for other in others:
        found = adversary.attack(
            network, lambda other=other: lambda moved: EXPECTED[other](images, moved, labels, network), images, generator=PerImage(9)
        )
        assert not torch.allclose(found, wanted, atol=1e-3)


def test_without_a_random_start_the_first_run_begins_at_the_image_and_the_others_at_random():
    network, settings = build(ARCHITECTURE, seed=0).eval(), configuration("evaluate.random_start=false", "evaluate.restarts=2")
    images, labels = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    figure = figures(settings, None)[1]
    runs = {name: [getattr(figure, name)(network, images, labels, PerImage(seed)) for seed in (1, 2)] for name in ("craft", "again")}
    assert torch.equal(*runs["craft"]) and not torch.equal(*runs["again"])


def test_pgd_on_the_margin_begins_at_random_whatever_the_other_attacks_do():
    """It is the first of the cascade, and at the image it would repeat what threat model II has done."""
    network, settings = build(ARCHITECTURE, seed=0).eval(), configuration("evaluate.random_start=false", "evaluate.steps=2")
    images, labels = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    listed = {figure.name: figure for figure in plan(settings, None, classes=10)}
    begins = {name: figure.settings["random_start"] for name, figure in listed.items() if "random_start" in figure.settings}
    assert begins == {"accuracy/threat_model_2": False, "accuracy/threat_model_2_half": False, "worst_case/pgd-margin": True}
    for name, random in begins.items():
        first, second = (listed[name].craft(network, images, labels, PerImage(seed)) for seed in (1, 2))
        assert torch.equal(first, second) is not random


@pytest.mark.parametrize("name", ["accuracy/threat_model_1", "accuracy/threat_model_2", "worst_case/pgd-margin"])
@pytest.mark.parametrize(("key", "value", "usual"), [("momentum", 0.5, 0.0), ("schedule", "linear", "constant"), ("keep", "last", "best")])
def test_every_attack_of_our_own_is_made_as_evaluate_says(name, key, value, usual):
    network, settings = build(ARCHITECTURE, seed=0).eval(), configuration("evaluate.steps=4", f"evaluate.{key}={value}")
    images, labels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 2, 1, 5])
    (figure,) = (figure for figure in plan(settings, SCHEMES["SCL"], classes=10) if figure.name == name)
    adversary = evaluation_adversary(settings, epsilon=settings.threat_model.epsilon)
    assert figure.settings[key] == getattr(adversary, key) == value

    def attacked_by(adversary):
        objective = lambda: lambda moved: EXPECTED[name](images, moved, labels, network)  # noqa: E731
        return adversary.attack(network, objective, images, generator=PerImage(9))

    found = figure.craft(network, images, labels, PerImage(9))
    assert torch.allclose(found, attacked_by(adversary), atol=1e-6)
    if key != "keep":  # the last iterate of an ascent is often the best
        assert not torch.allclose(found, attacked_by(replace(adversary, **{key: usual})), atol=1e-3)


def undecided(images: torch.Tensor):
    """An untrained network prefers one class; this one is undecided. And its own predictions as labels."""
    network = build(ARCHITECTURE, seed=0).eval()
    with torch.no_grad():
        network.classifier.bias -= network(images / 255).mean(0)
        return network, network(images / 255).argmax(1)


def test_a_figure_equals_its_attack_followed_by_a_prediction_and_the_worst_case_is_below_all():
    settings = configuration("evaluate.steps=3", "threat_model.epsilon=0.01", "evaluate.batch_size=5", "evaluate.seed=3", *WEAK)
    images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, labels = undecided(images)
    listed = plan(settings, SCHEMES["SCL"], classes=10)
    found = measure(network, Split(images, labels), listed, effort(settings, CPU))
    assert found["accuracy/clean"].right.all() and 0 < found["accuracy/threat_model_2"].right.sum() < 12
    for figure in listed[1:3]:
        expected = []
        for x, y in zip((images / 255).split(5), labels.split(5), strict=True):
            moved = figure.craft(network, x, y, PerImage(derived_seed(figure.name, 3, 0)))
            expected.append(network(moved).argmax(1) == y)
        assert torch.equal(found[figure.name].right, torch.cat(expected))
    worst = survivors(found)
    for outcome in found.values():
        assert not (worst[outcome.rows] & ~outcome.right).any()
    assert worst.sum() < found["accuracy/threat_model_2"].right.sum()  # the cascade breaks more


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.03), ("l2", 0.2)])
def test_neither_the_batch_nor_who_has_left_it_changes_anything(norm, epsilon):
    """In double precision, where rounding does not either: the cascade, and every attack on all images in batches of another size.

    Steps of 1e-6 leave PGD with its random starts, and the images that are found tell more than verdicts.
    """
    changes = ("evaluate.steps=1", "evaluate.step_size=1e-6", "worst_case.restarts=2", f"threat_model.norm={norm}")
    settings = configuration(*changes, *WEAK, f"evaluate.epsilon={epsilon}")
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, labels = undecided(images)
    own = network.double()
    exact = torch.nn.Sequential(Cast(torch.float64), own, Cast(torch.float32))
    listed, split = plan(settings, None, classes=10), Split(images, labels)
    everyone = [replace(figure, left_only=False, coupled=True, kept=True) for figure in listed]
    cascade, together, apart = (
        measure(exact, split, listed_, Effort(size, 0, CPU)) for listed_, size in ((listed, 7), (everyone, 40), (everyone, 5))
    )
    for name, outcome in together.items():
        left = cascade[name]
        assert torch.equal(apart[name].right, outcome.right) and torch.equal(left.right, outcome.right[left.rows])
        if outcome.images is not None:
            torch.testing.assert_close(apart[name].images, outcome.images, atol=1e-6, rtol=0)
    assert torch.equal(survivors(cascade), survivors(together)) and survivors(cascade).any()
    assert all(not together[f"worst_case/{name}"].right.all() for name in ("pgd-margin", *autoattack.ATTACKS))


class Cast(torch.nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.dtype)


WEAK = ("worst_case.steps=2", "worst_case.targets=2", "worst_case.queries=5")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_compare_gets_the_images_that_evaluate_would_store(norm):
    changes = (f"threat_model.norm={norm}", "evaluate.batch_size=8", "evaluate.steps=2", "evaluate.restarts=2")
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, labels = undecided(images)
    split, listed = Split(images, labels), figures(configuration(*changes), SCHEMES["CL"])
    stored = measure(network, split, listed, effort(configuration(*changes), CPU))["accuracy/threat_model_2"].images
    some, record = attacked(network, split, configuration(*changes, "evaluate.adversarial_images=13"), SCHEMES["CL"], CPU)
    assert torch.equal(some, stored[:13])
    assert record["restarts"] == 1 and record["n"] == 13 and record["norm"] == norm and "correct" not in record


def test_the_record_holds_every_hyperparameter_and_seed_of_the_attack():
    settings = configuration(
        "evaluate.restarts=3", "evaluate.seed=7", "evaluate.batch_size=64", "threat_model.epsilon=0.2", "evaluate.steps=10"
    )
    clean, first, second = figures(settings, SCHEMES["CL"], note="old head")[:3]
    found = outcome([True, True, False])
    assert describe(clean, found, settings) == {"n": 3, "correct": 2, "interval": list(wilson(2, 3))}
    record = describe(first, found, settings)
    assert record == {
        "n": 3,
        "correct": 2,
        "interval": list(wilson(2, 3)),
        "attack": "pgd",
        "objective": "contrastive",
        "norm": "linf",
        "epsilon": 0.2,
        "box": [0, 1],
        "steps": 10,
        "step_size": pytest.approx(0.05),
        "random_start": True,
        "keep": "best",
        "mode": "eval",
        "momentum": 0.0,
        "schedule": "constant",
        "restarts": 3,
        "seed": 7,
        "batch_size": 64,
        "forward": 9,
        "backward": 6,
        "note": "old head",
    }
    record = describe(second, found, settings)
    assert record["objective"] == "cross-entropy" and "note" not in record


def test_the_record_of_the_worst_case_tells_what_each_attack_was_aimed_at_broke_and_cost():
    settings = configuration("worst_case.attacks=[pgd-margin, square]", "worst_case.restarts=3", "worst_case.queries=77")
    listed = [figure for figure in plan(settings, None, classes=10) if figure.name in FOUND]
    record = describe_worst(listed, FOUND, settings)
    steps = record.pop("cascade")
    low, high = wilson(1, 4)
    assert record == {
        **{"n": 4, "correct": 1, "interval": [low, high], "attack": "cascade", "norm": "linf", "box": [0, 1]},
        **{"epsilon": settings.threat_model.epsilon, "seed": 0, "batch_size": 512, "forward": 21, "backward": 14},
    }
    told = [(step["name"], step["aimed_at"], step["broke"], step["restarts"], step["forward"]) for step in steps]
    assert told == [("threat_model_2", 4, 1, 1, 12), ("pgd-margin", 2, 1, 3, 6), ("square", 1, 0, 1, 3)]
    assert steps[1]["objective"] == "margin" and steps[2]["queries"] == 77 and steps[2]["library"] == "pyautoattack"


def test_the_record_of_the_worst_case_holds_the_radius_of_the_attacks_not_that_of_training():
    settings = configuration("threat_model.epsilon=0.3", "evaluate.epsilon=0.1", "worst_case.attacks=[pgd-margin, square]")
    listed = [figure for figure in plan(settings, None, classes=10) if figure.name in FOUND]
    record = describe_worst(listed, FOUND, settings)
    assert [record["epsilon"], *(step["epsilon"] for step in record["cascade"])] == [0.1] * 4
