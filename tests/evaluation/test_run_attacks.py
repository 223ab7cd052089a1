"""Every image is counted once, survives only if it survives every restart, and broken images are attacked no further."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advml.attacks.per_image_rng import PerImageGenerator
from advml.attacks.threat_model import ThreatModel
from advml.core.device import Machine
from advml.core.errors import Failure
from advml.core.result_cache import Memo
from advml.data.datasets import Split
from advml.evaluation.attack_suite import AttackSpec
from advml.evaluation.run_attacks import NOT_FINITE, Scorer, counted, run_attacks
from advml.evaluation.samples import Outcome

CPU = Machine(torch.device("cpu"))
THREAT = ThreatModel("linf", 0.05)
STEP = 10 / 255  # from one class to the next


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
    """An attack that in its n-th run breaks the classes of the n-th set, and remembers whom it was shown."""

    breaks: list[set[int]]
    by: float = STEP
    shown: list[list[int]] = field(default_factory=list)
    draws: list[list[float]] = field(default_factory=list)

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor, draws: PerImageGenerator) -> Tensor:
        classes = (images.flatten() * 25.5).round().int().tolist()
        broken = self.breaks[len(self.shown)]
        self.shown.append(classes)
        self.draws.append(draws.draw(lambda like, generator: torch.rand(like.shape, generator=generator), images).flatten().tolist())
        network(images)  # so that there is something to count
        moved = torch.tensor([self.by if label in broken else 0.0 for label in classes])
        return images + moved.view(-1, 1, 1, 1)


def split(classes: list[int], labels: list[int] | None = None) -> Split:
    return Split((10 * torch.tensor(classes)).to(torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels or classes))


def figure(attack: Scripted, name: str = "accuracy/x", **how) -> AttackSpec:
    return AttackSpec(name, attack, threat_model=THREAT, **how)


def run(data: Split, *figures: AttackSpec, batch_size: int = 100, seed: int = 0, keep: int | None = None, **options) -> dict[str, Outcome]:
    return attacked(Reader(), data, *figures, batch_size=batch_size, seed=seed, keep=keep, **options)


def attacked(network: nn.Module, data: Split, *figures: AttackSpec, batch_size: int, seed: int = 0, **options) -> dict[str, Outcome]:
    attacks = [AttackSpec("accuracy/clean"), *figures]
    return run_attacks(network, Scorer.of(network, CPU), data, attacks, batch_size=batch_size, seed=seed, **options)


def right(data: Split, attack: Scripted, *, batch_size: int = 100, seed: int = 0, **how) -> list[bool]:
    return run(data, figure(attack, **how), batch_size=batch_size, seed=seed)["accuracy/x"].right.tolist()


# Clean images


def test_clean_accuracy_counts_every_image_of_every_batch():
    told = []
    found = run(split([0, 1, 2, 3, 4], [0, 9, 2, 3, 9]), batch_size=2, on_batch=lambda *state: told.append(state))
    clean = found["accuracy/clean"]
    assert clean.right.tolist() == [True, False, True, True, False] and clean.predicted.tolist() == [0, 1, 2, 3, 4]
    assert told == [(2, 0.8), (4, 0.8), (5, 0.6), (5, 0.6)]


def test_logits_that_are_no_numbers_are_a_wrong_prediction():
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[9.0, 0.0], [9.0, torch.nan], [torch.inf, 0.0]])

    clean = attacked(Broken(), split([0, 0, 0]), batch_size=3)["accuracy/clean"]
    assert clean.right.tolist() == [True, False, False] and clean.predicted.tolist() == [0, NOT_FINITE, NOT_FINITE]


def test_the_network_is_judged_in_eval_mode_and_by_a_copy():
    network = Reader().train()
    attacked(network, split([0]), batch_size=1)
    assert network.modes == [] and not network.training


# Who is attacked


@pytest.mark.parametrize("coupled", [False, True])
def test_an_image_survives_only_if_it_survives_every_restart(coupled):
    attack = Scripted([{0, 2}, {1}, set()])
    assert right(split([0, 1, 2, 3]), attack, coupled=coupled, restarts=3) == [False, False, False, True]


def test_repetitions_of_an_attack_that_begins_at_the_image_begin_at_random():
    """Or they would repeat it; the figure says what they do."""
    first, others = Scripted([{0}]), Scripted([{1}, set()])
    found = run(split([0, 1, 2]), figure(first, again=others, restarts=3))["accuracy/x"]
    assert (first.shown, others.shown) == ([[0, 1, 2]], [[1, 2], [2]]) and found.right.tolist() == [False, False, True]


def test_broken_images_leave_the_batch_of_a_per_sample_objective():
    attack = Scripted([{0, 2}, {1}, set()])
    right(split([0, 1, 2, 3, 4], [0, 1, 2, 3, 9]), attack, restarts=3)
    assert attack.shown == [[0, 1, 2, 3], [1, 3], [3]]


def test_no_image_leaves_the_batch_of_an_objective_that_couples_it():
    attack = Scripted([{0, 2}, {1}, {0, 1, 2, 3, 4}])
    right(split([0, 1, 2, 3, 4], [0, 1, 2, 3, 9]), attack, restarts=3, coupled=True)
    assert attack.shown == [[0, 1, 2, 3, 4]] * 3


def test_nothing_is_attacked_once_every_image_is_broken():
    attack, never = Scripted([{0, 1}]), Scripted([])
    found = run(split([0, 1]), figure(attack, restarts=5), figure(never, "worst_case/y", left_only=True))
    assert not found["accuracy/x"].right.any() and len(attack.shown) == 1
    assert never.shown == [] and len(found["worst_case/y"].rows) == len(found["worst_case/y"].right) == 0


def test_an_image_that_is_wrong_when_clean_stays_wrong_when_the_attack_mends_it():
    assert right(split([4, 1], [5, 1]), Scripted([{4}]), coupled=True) == [False, True]


def test_the_cascade_is_aimed_at_what_all_before_it_have_left():
    first, second, third = Scripted([{0, 5}, set()]), Scripted([{1, 6}]), Scripted([set()])
    data = split([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 9, 4, 5, 6])
    figures = (figure(first, "accuracy/x"), figure(second, "worst_case/y", left_only=True), figure(third, "worst_case/z", left_only=True))
    found = run(data, *figures, batch_size=6)
    assert first.shown == [[0, 1, 2, 4, 5], [6]]
    assert second.shown == [[1, 2, 4, 6]]  # the survivors of two batches are one
    assert third.shown == [[2, 4]] and found["worst_case/z"].rows.tolist() == [2, 4]


def test_every_image_and_every_restart_draws_its_own_random_numbers():
    attack, again, other = (Scripted([set()] * 6) for _ in range(3))
    for scripted, seed in ((attack, 0), (again, 0), (other, 1)):
        right(split([0, 1, 2, 3, 4]), scripted, batch_size=2, restarts=2, seed=seed)
    drawn, others = ({number for batch in scripted.draws for number in batch} for scripted in (attack, other))
    assert len(drawn) == 10 and attack.draws == again.draws and not drawn & others


def test_an_image_draws_the_same_in_any_batch_and_whoever_has_left():
    together, apart, fewer = Scripted([set(), set()]), Scripted([set()] * 4), Scripted([{0, 2}, set()])
    right(split([0, 1, 2, 3]), together, restarts=2)
    right(split([0, 1, 2, 3]), apart, batch_size=2, restarts=2)
    right(split([0, 1, 2, 3]), fewer, restarts=2)
    first, second = together.draws
    assert apart.draws == [first[:2], second[:2], first[2:], second[2:]] and fewer.draws == [first, [second[1], second[3]]]


# What is noted


def test_the_class_and_the_distance_are_those_of_the_example_that_broke_the_image():
    found = run(split([0, 1, 2, 3], [0, 1, 2, 9]), figure(Scripted([{0}, {1}]), restarts=2))["accuracy/x"]
    assert found.predicted.tolist() == [1, 2, 2, 3]
    assert found.distance[:2].tolist() == pytest.approx([STEP, STEP]) and found.distance[2:].isnan().all()


def test_passes_are_counted_for_the_images_that_took_them():
    found = run(split([0, 1, 2, 3], [0, 1, 2, 9]), figure(Scripted([{0}, {1}, set()]), restarts=3))["accuracy/x"]
    assert found.forward.tolist() == [1, 2, 3, 0] and found.backward.tolist() == [0, 0, 0, 0]


def test_forward_and_backward_passes_of_single_images_are_counted():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images = torch.rand(5, 1, 2, 2, requires_grad=True)
    with counted(network) as passes:
        network(images).sum().backward()
        network(images[:2].detach())
        with torch.no_grad():
            network(images)
    assert passes == {"forward": 12, "backward": 5}
    network(images)
    assert passes["forward"] == 12 and not network._forward_hooks


@pytest.mark.parametrize(("keep", "expected"), [(None, [0, 1, 2, 3, 4]), (3, [0, 1, 2]), (2, [0, 1])])
def test_kept_images_are_the_first_ones_as_the_first_restart_left_them_right_or_wrong(keep, expected):
    attack = Scripted([{0, 1}, {2, 3}, set(), set(), set()])
    found = run(split([0, 1, 2, 3, 4], [0, 9, 2, 3, 4]), figure(attack, kept=True, restarts=2), batch_size=2, keep=keep)
    moved = torch.tensor([STEP, STEP, STEP, STEP, 0.0])[: len(expected)]
    images = found["accuracy/x"].images.flatten()
    assert torch.allclose(images, torch.tensor(expected) * STEP + moved, atol=1e-6)
    assert attack.shown[0] == [0, 1]  # also the one that is wrong already


@pytest.mark.parametrize("by", [0.06, torch.nan, -0.01], ids=["ball", "not a number", "box"])
def test_an_attack_that_leaves_its_threat_model_stops_everything(by):
    with pytest.raises(Failure, match="accuracy/x left its threat model"):
        run(split([0, 1]), figure(Scripted([{0, 1}], by=by)))


# Parts that are done are not done again


def test_a_remembered_batch_is_not_attacked_again(tmp_path):
    data, first = split([0, 1, 2, 3]), Scripted([{0}, set()])
    found = run(data, figure(first, kept=True), batch_size=2, memo=Memo(tmp_path))
    (tmp_path / "accuracy.x.batch.1.safetensors").write_bytes(b"cut short")
    again = Scripted([set()])
    remembered = run(data, figure(again, kept=True), batch_size=2, memo=Memo(tmp_path))
    assert again.shown == [[2, 3]]
    for name in ("right", "predicted", "forward", "images"):
        assert torch.equal(getattr(remembered["accuracy/x"], name), getattr(found["accuracy/x"], name))


def test_a_remembered_restart_is_not_attacked_again(tmp_path):
    data, first = split([0, 1, 2, 3]), Scripted([{0}, {1}, {2}])
    found = run(data, figure(first, restarts=3), memo=Memo(tmp_path))["accuracy/x"]
    (tmp_path / "accuracy.x.batch.0.restart.2.safetensors").unlink()
    again = Scripted([{2}])
    remembered = run(data, figure(again, restarts=3), memo=Memo(tmp_path))["accuracy/x"]
    assert again.shown == [[2, 3]] and again.draws == first.draws[2:]
    for name in ("right", "predicted", "forward"):
        assert torch.equal(getattr(remembered, name), getattr(found, name))
    assert found.distance[:3].tolist() == remembered.distance[:3].tolist() and found.distance[3].isnan()


def test_a_model_that_draws_at_random_gives_the_same_wherever_the_evaluation_goes_on(tmp_path):
    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.randn(len(images), 4)

    data, state = split([0, 1, 2, 3] * 10), torch.get_rng_state()

    def measured(folder: str) -> Tensor:
        found = attacked(Noisy(), data, batch_size=8, memo=Memo(tmp_path / folder))
        return found["accuracy/clean"].right

    whole = measured("first")
    for path in list((tmp_path / "first").iterdir())[:3]:
        path.unlink()
    assert torch.equal(measured("first"), whole) and torch.equal(torch.get_rng_state(), state)


def test_a_figure_draws_its_own_random_numbers():
    """Else the restarts of one attack would repeat the starts of another."""
    first, second = Scripted([set()]), Scripted([set()])
    run(split([0, 1]), figure(first, "accuracy/x"), figure(second, "accuracy/y"))
    assert first.draws != second.draws
