"""Accuracies count every image once, an image survives only if it survives every restart, and intervals are Wilson's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn

from advml import config
from advml.attacks.threat import ThreatModel
from advml.data.datasets import Split
from advml.evaluation.accuracy import Figure, correct, describe, figures, metrics, wilson
from advml.networks.models import Architecture, build
from advml.runtime.machine import Machine, generator_for
from advml.training.objectives import contrastive_pair, cross_entropy
from advml.training.schemes import SCHEMES

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


def test_metrics_have_the_contracts_names():
    flat = metrics({"accuracy/clean": torch.tensor([True, True, True, False])})
    low, high = wilson(3, 4)
    assert flat == {"accuracy/clean": 0.75, "accuracy/clean/low": low, "accuracy/clean/high": high}


# Counting


class Reader(nn.Module):
    """Classifies an image of one pixel by its grey value: a pixel of 30 / 255 is class 3. Remembers its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return F.one_hot((images.flatten() * 25.5).round().long(), 26).float()


@dataclass
class Scripted:
    """An adversary that in its n-th attack breaks the classes of the n-th set, and remembers whom it was shown."""

    breaks: list[set[int]]
    shown: list[list[int]] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)

    def attack(self, network: nn.Module, objective, images: Tensor, *, generator: torch.Generator) -> Tensor:
        classes = (images.flatten() * 25.5).round().int().tolist()
        broken = self.breaks[len(self.shown)]
        self.shown.append(classes)
        self.draws.append(float(torch.rand(1, generator=generator)))
        moved = torch.tensor([10 / 255 if label in broken else 0.0 for label in classes])
        return images + moved.view(-1, 1, 1, 1)


def split(classes: list[int], labels: list[int] | None = None) -> Split:
    return Split((10 * torch.tensor(classes)).to(torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels or classes))


def run(
    adversary: Scripted | None, data: Split, *, coupled: bool = False, restarts: int = 1, batch_size: int = 100, **changes
) -> list[bool]:
    figure = Figure("accuracy/x", adversary, coupled=coupled)
    settings = {"seed": 0, "machine": CPU, "batch_size": batch_size, "restarts": restarts}
    return correct(Reader(), data, figure, **(settings | changes)).tolist()


def test_clean_accuracy_counts_every_image_of_every_batch():
    told = []
    right = run(None, split([0, 1, 2, 3, 4], [0, 9, 2, 3, 9]), batch_size=2, on_batch=told.append)
    assert right == [True, False, True, True, False] and told == [2, 2, 1]


@pytest.mark.parametrize("coupled", [False, True])
def test_an_image_survives_only_if_it_survives_every_restart(coupled):
    adversary = Scripted([{0, 2}, {1}, set()])
    assert run(adversary, split([0, 1, 2, 3]), coupled=coupled, restarts=3) == [False, False, False, True]


def test_broken_images_leave_the_batch_of_a_per_sample_objective():
    adversary = Scripted([{0, 2}, {1}, set()])
    run(adversary, split([0, 1, 2, 3, 4], [0, 1, 2, 3, 9]), restarts=3)
    assert adversary.shown == [[0, 1, 2, 3], [1, 3], [3]]


def test_no_image_leaves_the_batch_of_an_objective_that_couples_it():
    adversary = Scripted([{0, 2}, {1}, {0, 1, 2, 3, 4}])
    run(adversary, split([0, 1, 2, 3, 4], [0, 1, 2, 3, 9]), restarts=3, coupled=True)
    assert adversary.shown == [[0, 1, 2, 3, 4]] * 3


def test_nothing_is_attacked_once_every_image_is_broken():
    adversary = Scripted([{0, 1}])
    assert run(adversary, split([0, 1]), restarts=5) == [False, False]
    assert len(adversary.shown) == 1


def test_an_image_that_is_wrong_when_clean_stays_wrong_when_the_attack_mends_it():
    adversary = Scripted([{4}])
    assert run(adversary, split([4, 1], [5, 1]), coupled=True) == [False, True]


def test_every_batch_and_every_restart_draws_its_own_random_numbers():
    adversary, again, other = (Scripted([set()] * 6) for _ in range(3))
    run(adversary, split([0, 1, 2, 3, 4]), batch_size=2, restarts=2)
    run(again, split([0, 1, 2, 3, 4]), batch_size=2, restarts=2)
    run(other, split([0, 1, 2, 3, 4]), batch_size=2, restarts=2, seed=1)
    assert len(set(adversary.draws)) == 6 and adversary.draws == again.draws
    assert not set(adversary.draws) & set(other.draws)


def test_the_network_is_judged_in_eval_mode():
    network = Reader().train()
    correct(network, split([0]), Figure("accuracy/clean"), batch_size=1, restarts=1, seed=0, machine=CPU)
    assert network.modes == [False]


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
        assert first.adversary == second.adversary and first.adversary.threat_model == ThreatModel("linf", epsilon)
        assert first.coupled and not second.coupled and first.note == "old head" and not second.note


def test_the_supervised_scheme_has_no_threat_model_1():
    names = [figure.name for figure in figures(configuration(), SCHEMES["SL"])]
    assert names == ["accuracy/clean", "accuracy/threat_model_2", "accuracy/threat_model_2_half"]


@pytest.mark.parametrize("scheme", ["CL", "SCL"])
def test_threat_model_1_ascends_the_contrastive_objective_and_2_the_cross_entropy(scheme):
    network = build(ARCHITECTURE, seed=0).eval()
    images, labels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 2, 1, 5])
    elsewhere = images.flip(3)
    groups = {"CL": torch.arange(6), "SCL": labels}[scheme]
    first, second = figures(configuration(), SCHEMES[scheme])[1:3]
    expected = contrastive_pair(network.embed(images), network.embed(elsewhere), groups, temperature=configuration().temperature)
    assert torch.equal(first.objective(network, images, labels)(elsewhere), expected)
    assert torch.equal(second.objective(network, images, labels)(elsewhere), cross_entropy(network(elsewhere), labels))


def test_a_figure_equals_its_attack_followed_by_a_prediction():
    network, settings = build(ARCHITECTURE, seed=0).eval(), configuration("evaluate.steps=3", "threat_model.epsilon=0.01")
    images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.classifier.bias -= network(images / 255).mean(0)  # an untrained network prefers one class; this one is undecided
        labels = network(images / 255).argmax(1)
    clean, first, second = figures(settings, SCHEMES["SCL"])[:3]
    measured = [correct(network, Split(images, labels), f, batch_size=5, restarts=1, seed=3, machine=CPU) for f in (clean, first, second)]
    assert measured[0].all() and 0 < measured[2].sum() < 12
    for figure, right in zip((first, second), measured[1:], strict=True):
        expected = []
        for number, (x, y) in enumerate(zip((images / 255).split(5), labels.split(5), strict=True)):
            draw = generator_for(figure.name, 3, number, 0)
            attacked = figure.adversary.attack(network, lambda x=x, y=y, f=figure: f.objective(network, x, y), x, generator=draw)
            expected.append(network(attacked).argmax(1) == y)
        assert torch.equal(right, torch.cat(expected))


def test_the_record_holds_every_hyperparameter_and_seed_of_the_attack():
    settings = configuration(
        "evaluate.restarts=3", "evaluate.seed=7", "evaluate.batch_size=64", "threat_model.epsilon=0.2", "evaluate.steps=10"
    )
    clean, first, second = figures(settings, SCHEMES["CL"], note="old head")[:3]
    right = torch.tensor([True, True, False])
    assert describe(clean, right, settings) == {"n": 3, "correct": 2, "interval": list(wilson(2, 3))}
    record = describe(first, right, settings)
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
        "restarts": 3,
        "seed": 7,
        "batch_size": 64,
        "note": "old head",
    }
    record = describe(second, right, settings)
    assert record["objective"] == "cross-entropy" and "note" not in record
