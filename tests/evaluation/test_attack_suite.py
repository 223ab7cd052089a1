"""The attacks of an evaluation: which there are, what they ascend, and what they make of images, whatever the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advml import config
from advml.attacks import autoattack
from advml.attacks.per_image_rng import PerImageGenerator as Generator
from advml.attacks.pgd import Adversary, evaluation_adversary
from advml.attacks.threat_model import ThreatModel
from advml.core.device import Machine, derived_seed
from advml.data.datasets import Split
from advml.evaluation import attack_suite
from advml.evaluation.attack_suite import classification, pgd_attack, threat_model_2
from advml.evaluation.metrics import survivors
from advml.evaluation.run_attacks import Scorer, kept_images, run_attacks
from advml.models.network import Architecture, build
from advml.training.losses import contrastive_views, cross_entropy, margin

ARCHITECTURE = Architecture("test_resnet", "small", {}, 1, 8, (0.4,), (0.3,), 10, 16, False, False)
CPU = Machine(torch.device("cpu"))

PARAMS = Path(__file__).parents[2] / "params.yaml"


def configuration(*overrides: str) -> config.Config:
    return config.load(PARAMS, overrides)


ALONE = "worst_case.attacks=[]"  # the threat models alone


@pytest.fixture
def cascade_of(suite):
    return lambda settings, classes=10: [attack for attack in suite(settings, classes=classes) if attack.left_only]


def test_a_contrastive_scheme_is_measured_under_both_threat_models_at_two_epsilons(suite):
    asked = suite(configuration("threat_model.epsilon=0.3", ALONE), "CL", note="old head")
    listed = {attack.name: attack for attack in asked}
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


@pytest.mark.parametrize("scheme", ["SL", None])
def test_without_a_contrastive_scheme_there_is_no_threat_model_1(suite, scheme):
    names = [attack.name for attack in suite(configuration(ALONE), scheme)]
    assert names == ["accuracy/clean", "accuracy/threat_model_2", "accuracy/threat_model_2_half"]


def test_the_record_has_the_length_of_a_step_that_the_adversary_leaves_open():
    adversary = Adversary(ThreatModel("linf", 0.2), steps=5, step_size=None, random_start=True, keep="last")
    found = pgd_attack("accuracy/more", adversary, classification("ce"), loss="ce")
    assert found.settings["step_size"] == 0.1 and adversary.scaled(0.5).step_size == 0.05


def test_an_attack_that_is_not_of_autoattack_is_run_with_any_number_of_classes(monkeypatch):
    monkeypatch.setattr(attack_suite, "library_attack", lambda name, *_, **__: attack_suite.AttackSpec(f"worst_case/{name}"))
    settings = configuration()
    asked = settings.worst_case.model_copy(update={"attacks": ("pgd-margin", "mine", "apgd-t")})
    found = attack_suite.cascade(settings.evaluate, settings.threat_model, asked, classes=2)
    assert [attack.name for attack in found] == ["worst_case/pgd-margin", "worst_case/mine"]


def test_the_cascade_holds_the_attacks_in_the_order_of_params_yaml_as_far_as_there_are_enough_classes(cascade_of):
    names = ["pgd-margin", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert [figure.name for figure in cascade_of(configuration())] == [f"worst_case/{name}" for name in names]
    few = [attack.name for attack in cascade_of(configuration(), classes=3)]
    assert few == [f"worst_case/{name}" for name in names if name != "apgd-t"]
    assert set(names) - {name.removeprefix("worst_case/") for name in few} == set(autoattack.not_run(names, 3)) == {"apgd-t"}
    assert autoattack.not_run(names, 4) == {}
    some = cascade_of(configuration("worst_case.attacks=[square, pgd-margin]", "worst_case.restarts=4"))
    assert [figure.name for figure in some] == ["worst_case/square", "worst_case/pgd-margin"] and all(figure.left_only for figure in some)
    assert some[1].restarts == 4 and some[1].settings["random_start"]
    assert cascade_of(configuration(ALONE)) == []


def test_the_record_has_the_number_of_target_classes_that_there_are(cascade_of):
    def targets(classes: int) -> set[int]:
        found = cascade_of(configuration("worst_case.targets=9", "worst_case.attacks=[apgd-t, fab-t]"), classes=classes)
        return {attack.settings["targets"] for attack in found if "targets" in attack.settings}

    assert (targets(3), targets(10), targets(100)) == ({2}, {9}, {9})


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
def test_pgd_on_cross_entropy_and_on_the_margin_are_always_in_the_worst_case(objective, attacks, names, cascade_of):
    found = cascade_of(configuration(f"evaluate.objective={objective}", f"worst_case.attacks={attacks}"))
    assert [figure.name for figure in found] == [f"worst_case/{name}" for name in names]
    own = {figure.name: figure for figure in found if "objective" in figure.settings}
    said = {"worst_case/pgd-ce": "cross-entropy", "worst_case/pgd-margin": "margin"}
    assert all(figure.settings["objective"] == said[name] and figure.restarts == 3 for name, figure in own.items())


EXPECTED = {
    "accuracy/threat_model_1": lambda x, moved, y, net: contrastive_views(
        torch.stack([net.embed(x), net.embed(moved)]), y, temperature=configuration().temperature
    ),
    "accuracy/threat_model_2": lambda x, moved, y, net: cross_entropy(net(moved), y),
    "worst_case/pgd-margin": lambda x, moved, y, net: margin(net(moved), y),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_figure_ascends_its_own_objective(name, suite):
    """The attack of the plan against the adversary of params.yaml on the objective of the methods, written out."""
    network, settings = build(ARCHITECTURE, seed=0).eval(), configuration("evaluate.steps=3")
    images, labels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 2, 1, 5])
    (figure,) = (figure for figure in suite(settings, "SCL") if figure.name == name)
    adversary = evaluation_adversary(settings.evaluate, settings.threat_model)
    wanted = adversary.attack(network, lambda: lambda moved: EXPECTED[name](images, moved, labels, network), images, generator=Generator(9))
    assert torch.allclose(figure.craft(network, images, labels, Generator(9)), wanted, atol=1e-6)
    others = [other for other in EXPECTED if other != name]
    for other in others:
        found = adversary.attack(
            network, lambda other=other: lambda moved: EXPECTED[other](images, moved, labels, network), images, generator=Generator(9)
        )
        assert not torch.allclose(found, wanted, atol=1e-3)


def test_without_a_random_start_the_first_run_begins_at_the_image_and_the_others_at_random(suite):
    network, settings = build(ARCHITECTURE, seed=0).eval(), configuration("evaluate.random_start=false", "evaluate.restarts=2")
    images, labels = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    figure = suite(settings)[1]
    runs = {name: [getattr(figure, name)(network, images, labels, Generator(seed)) for seed in (1, 2)] for name in ("craft", "again")}
    assert torch.equal(*runs["craft"]) and not torch.equal(*runs["again"])


def test_pgd_on_the_margin_begins_at_random_whatever_the_other_attacks_do(suite):
    """It is the first of the cascade, and at the image it would repeat what threat model II has done."""
    network, settings = build(ARCHITECTURE, seed=0).eval(), configuration("evaluate.random_start=false", "evaluate.steps=2")
    images, labels = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    listed = {figure.name: figure for figure in suite(settings)}
    begins = {name: figure.settings["random_start"] for name, figure in listed.items() if "random_start" in figure.settings}
    assert begins == {"accuracy/threat_model_2": False, "accuracy/threat_model_2_half": False, "worst_case/pgd-margin": True}
    for name, random in begins.items():
        first, second = (listed[name].craft(network, images, labels, Generator(seed)) for seed in (1, 2))
        assert torch.equal(first, second) is not random


@pytest.mark.parametrize("name", ["accuracy/threat_model_1", "accuracy/threat_model_2", "worst_case/pgd-margin"])
@pytest.mark.parametrize(("key", "value", "usual"), [("momentum", 0.5, 0.0), ("schedule", "linear", "constant"), ("keep", "last", "best")])
def test_every_attack_of_our_own_is_made_as_evaluate_says(name, key, value, usual, suite):
    network, settings = build(ARCHITECTURE, seed=0).eval(), configuration("evaluate.steps=4", f"evaluate.{key}={value}")
    images, labels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 2, 1, 5])
    (figure,) = (figure for figure in suite(settings, "SCL") if figure.name == name)
    adversary = evaluation_adversary(settings.evaluate, settings.threat_model)
    assert figure.settings[key] == getattr(adversary, key) == value

    def attacked_by(adversary):
        objective = lambda: lambda moved: EXPECTED[name](images, moved, labels, network)  # noqa: E731
        return adversary.attack(network, objective, images, generator=Generator(9))

    found = figure.craft(network, images, labels, Generator(9))
    assert torch.allclose(found, attacked_by(adversary), atol=1e-6)
    if key != "keep":  # the last iterate of an ascent is often the best
        assert not torch.allclose(found, attacked_by(replace(adversary, **{key: usual})), atol=1e-3)


def undecided(images: torch.Tensor):
    """An untrained network prefers one class; this one is undecided. And its own predictions as labels."""
    network = build(ARCHITECTURE, seed=0).eval()
    with torch.no_grad():
        network.classifier.bias -= network(images / 255).mean(0)
        return network, network(images / 255).argmax(1)


def test_a_figure_equals_its_attack_followed_by_a_prediction_and_the_worst_case_is_below_all(suite):
    settings = configuration("evaluate.steps=3", "threat_model.epsilon=0.01", "evaluate.batch_size=5", "evaluate.seed=3", *WEAK)
    images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, labels = undecided(images)
    listed = suite(settings, "SCL")
    found = run_attacks(network, Scorer.of(network, CPU), Split(images, labels), listed, batch_size=5, seed=3)
    assert found["accuracy/clean"].right.all() and 0 < found["accuracy/threat_model_2"].right.sum() < 12
    for figure in listed[1:3]:
        expected = []
        for x, y in zip((images / 255).split(5), labels.split(5), strict=True):
            moved = figure.craft(network, x, y, Generator(derived_seed(figure.name, 3, 0)))
            expected.append(network(moved).argmax(1) == y)
        assert torch.equal(found[figure.name].right, torch.cat(expected))
    worst = survivors(found)
    for outcome in found.values():
        assert not (worst[outcome.rows] & ~outcome.right).any()
    assert worst.sum() < found["accuracy/threat_model_2"].right.sum()  # the cascade breaks more


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.03), ("l2", 0.2)])
def test_neither_the_batch_nor_who_has_left_it_changes_anything(norm, epsilon, suite):
    """In double precision, where rounding does not either: the cascade, and every attack on all images in batches of another size.

    Steps of 1e-6 leave PGD with its random starts, and the images that are found tell more than verdicts.
    """
    changes = ("evaluate.steps=1", "evaluate.step_size=1e-6", "worst_case.restarts=2", f"threat_model.norm={norm}")
    settings = configuration(*changes, *WEAK, f"evaluate.epsilon={epsilon}")
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, labels = undecided(images)
    own = network.double()
    exact = torch.nn.Sequential(Cast(torch.float64), own, Cast(torch.float32))
    listed, split = suite(settings), Split(images, labels)
    everyone = [replace(figure, left_only=False, coupled=True, kept=True) for figure in listed]
    cascade, together, apart = (
        run_attacks(exact, Scorer.of(exact, CPU), split, attacks, batch_size=size, seed=0)
        for attacks, size in ((listed, 7), (everyone, 40), (everyone, 5))
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
def test_images_are_kept_alike_with_and_without_the_rest_of_the_evaluation(norm, suite):
    settings = configuration(f"threat_model.norm={norm}", "evaluate.steps=2", "evaluate.restarts=2", ALONE)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network, labels = undecided(images)
    split, run = Split(images, labels), {"batch_size": 8, "seed": 0}
    stored = run_attacks(network, Scorer.of(network, CPU), split, suite(settings, "CL"), **run)["accuracy/threat_model_2"].images
    kept = kept_images(network, split, threat_model_2(settings.evaluate, settings.threat_model), CPU, **run, keep=13)
    assert torch.equal(kept, stored[:13])
