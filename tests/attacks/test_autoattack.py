"""The library's attacks: what the library gives for each image alone, for every number of classes, and nothing else changes."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from advml.attacks import autoattack
from advml.attacks.autoattack import ATTACKS, Recipe, Strength, applicable, attack
from advml.attacks.per_image_rng import PerImageGenerator
from advml.attacks.threat_model import NORMS, ThreatModel
from advml.core.errors import Failure, UserError
from advml.models.network import Architecture, build

QUICK = Strength(steps=8, queries=60)
GRADIENT, BLIND = {"linf": 0.04, "l2": 0.3}, {"linf": 0.1, "l2": 0.9}  # break some of the images of `batch`, not all
EPSILON = {"apgd-ce": GRADIENT, "apgd-t": GRADIENT, "fab-t": GRADIENT, "square": BLIND}
LIBRARY_NORM = {"linf": "Linf", "l2": "L2"}
EVERY = pytest.mark.parametrize("name", ATTACKS)
BOTH = pytest.mark.parametrize("norm", GRADIENT)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_network(classes: int = 4) -> nn.Module:
    """Convolution, batch norm, dropout, classifier: everything that an attack could leave changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(384, classes),
        )
    return network.eval()


def batch(network: nn.Module, count: int = 6) -> tuple[Tensor, Tensor]:
    """Images in which some pixels touch the box, all classified correctly but the last, if there are several."""
    images = (1.4 * torch.rand(count, 3, 8, 8, generator=seeded()) - 0.2).clamp(0, 1)
    logits = network(images).detach()
    labels = logits.argmax(1)
    if count > 1:
        labels[-1] = logits[-1].argmin()
    return images, labels


def run(name: str, network: nn.Module, images: Tensor, labels: Tensor, *, norm: str = "linf", classes: int = 4, **changes) -> Tensor:
    settings = {"threat_model": ThreatModel(norm, EPSILON.get(name, BLIND)[norm]), "strength": QUICK, "seed": 7} | changes
    return attack(name, network, images, labels, classes=classes, **settings)


def broken(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return network(images).argmax(1) != labels


class Constant(nn.Module):
    """Logits that do not depend on the image at all: there is nothing to differentiate."""

    def __init__(self, *logits: float):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


# The library's results


class Exact(nn.Module):
    """A network in double precision between floats, so that its outputs do not depend on what else is in the batch."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network).double()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.double()).float()


def alone(name: str, images: Tensor, labels: Tensor, perturb: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """What the library makes of each image alone, with the seed that ours gives it."""
    seeds = [PerImageGenerator(7).seed_of(image) if name.startswith("apgd") else 7 for image in images]
    each = zip(images.split(1), labels.split(1), seeds, strict=True)
    return torch.cat([perturb(image.clone(), label.clone(), seed) for image, label, seed in each])


@BOTH
@EVERY
def test_the_standard_attacks_are_the_librarys_sample_by_sample(name, norm):
    """At the standard strength, but for Square's queries: the library can be told those afterwards."""
    network = Exact(small_network())
    images, labels = batch(network)

    def perturb(image: Tensor, label: Tensor, seed: int) -> Tensor:
        library = AutoAttack(network, attacks=[name], norm=LIBRARY_NORM[norm], eps=EPSILON[name][norm], seed=seed, version="custom")
        library.apgd.n_restarts, library.square.n_queries = 1, 60
        library.fab.n_target_classes = library.apgd_targeted.n_target_classes = 3
        return library.run_standard_evaluation(image, label)[0]

    theirs = alone(name, images, labels, perturb)
    ours = run(name, network, images, labels, norm=norm, strength=Strength(queries=60))
    assert 0 < broken(network, ours[:-1], labels[:-1]).sum() <= 5
    assert torch.equal(broken(network, ours, labels), broken(network, theirs, labels))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def directly(name: str, network: nn.Module, images: Tensor, labels: Tensor, seed: int, *, norm: str, targets: int) -> Tensor:
    common = {"norm": LIBRARY_NORM[norm], "eps": EPSILON[name][norm], "seed": seed, "device": "cpu"}
    made = {
        "apgd-ce": lambda: APGDAttack(network, n_iter=8, **common),
        "apgd-t": lambda: APGDAttack_targeted(network, n_iter=8, n_target_classes=targets, **common),
        "fab-t": lambda: FABAttack_PT(network, n_iter=8, targeted=True, n_target_classes=targets, **common),
        "square": lambda: SquareAttack(network, n_queries=20, p_init=0.8, resc_schedule=False, **common),
    }[name]()
    return made.perturb(images.clone(), labels.clone()).detach()


@BOTH
@EVERY
@pytest.mark.parametrize("classes", [2, 3, 4, 100])
def test_every_attack_works_for_every_number_of_classes_as_the_library_does(name, norm, classes):
    network = Exact(small_network(classes))
    images, labels = batch(network)
    if not applicable(name, classes):
        with pytest.raises(UserError, match=f"{name} .* 4 .* {classes}"):
            run(name, network, images, labels, norm=norm, classes=classes)
        return
    theirs = alone(name, images, labels, partial(directly, name, network, norm=norm, targets=min(3, classes - 1)))
    ours = run(name, network, images, labels, norm=norm, classes=classes, strength=replace(QUICK, targets=3, queries=20))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert torch.equal(broken(network, ours, labels), broken(network, theirs, labels))


@pytest.mark.parametrize("name", ["apgd-t", "fab-t"])
def test_no_more_targets_than_other_classes_are_tried(name, monkeypatch):
    seen, recipe = [], ATTACKS[name]
    build = lambda model, strength, common: seen.append(strength.targets) or recipe.build(model, strength, common)  # noqa: E731
    monkeypatch.setitem(ATTACKS, name, replace(recipe, build=build))
    for classes in (4, 12):
        network = small_network(classes)
        run(name, network, *batch(network), classes=classes, strength=replace(QUICK, steps=1))
    assert seen == [3, 9]


# Ball, box, and what comes back


@BOTH
@EVERY
def test_results_lie_in_ball_and_box_and_images_that_do_not_break_come_back_as_they_were(name, norm):
    network = small_network()
    images, labels = batch(network, 12)
    attacked = run(name, network, images, labels, norm=norm)
    assert attacked.shape == images.shape and attacked.dtype == images.dtype and attacked.grad_fn is None and not attacked.requires_grad
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert (NORMS[norm].size(attacked - images) <= EPSILON[name][norm] + 1e-6).all()
    beaten = broken(network, attacked, labels) & ~broken(network, images, labels)
    assert beaten.any() and not beaten.all()
    assert torch.equal(attacked[~beaten], images[~beaten])


@BOTH
@EVERY
@pytest.mark.parametrize("logits", [(3.0, 1.0, 0.0, -1.0), (0.0, 0.0, 0.0, 0.0)], ids=["constant", "tied"])
def test_a_model_that_ignores_its_images_stays_unbroken(name, norm, logits):
    network, images = Constant(*logits), torch.rand(3, 1, 8, 8, generator=seeded())
    assert torch.equal(run(name, network, images, torch.tensor([0, 0, 1]), norm=norm), images)
    assert network.logits.tolist() == list(logits)  # the library writes into logits


@BOTH
@EVERY
def test_a_model_that_rounds_its_images_away_has_a_gradient_of_zero(name, norm):
    network = nn.Sequential(nn.Flatten(), nn.Threshold(2.0, 0.5), nn.Linear(64, 4))
    images = torch.rand(3, 1, 8, 8, generator=seeded())
    assert torch.equal(run(name, network, images, network(images).argmax(1), norm=norm), images)


@BOTH
@EVERY
def test_a_batch_of_one_and_one_all_misclassified_and_an_empty_one(name, norm):
    network = small_network()
    images, labels = batch(network)
    first = run(name, network, images[:1], labels[:1], norm=norm)
    assert first.shape == (1, 3, 8, 8) and not torch.equal(first, images[:1])
    wrong = (network(images).argmax(1) + 1) % 4
    assert torch.equal(run(name, network, images, wrong, norm=norm), images)
    assert run(name, network, images[:0], labels[:0], norm=norm).shape == (0, 3, 8, 8)


@BOTH
@EVERY
def test_channels_last_images_reach_the_model_as_such_and_give_the_same(name, norm):
    network = small_network()
    images, labels = batch(network)
    layouts = []
    network[0].register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    plain = run(name, network, images, labels, norm=norm)
    assert not any(layouts)
    layouts.clear()
    attacked = run(name, network, images.contiguous(memory_format=torch.channels_last), labels, norm=norm)
    assert layouts and all(layouts) and attacked.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(broken(network, attacked, labels), broken(network, plain, labels))


@EVERY
def test_a_model_in_double_precision_gets_its_images_so(name):
    network = small_network().double()
    images, labels = batch(small_network())
    attacked = run(name, network, images.double(), labels)
    assert attacked.dtype == torch.float64 and broken(network, attacked, labels).sum() > 1
    assert (NORMS["linf"].size(attacked - images) <= EPSILON[name]["linf"] + 1e-12).all()


# Randomness


class Unbroken(nn.Module):
    """Always right, and keeps what it was shown."""

    def __init__(self, network: nn.Module, label: int):
        super().__init__()
        self.network, self.bias, self.seen = network, 10.0 * torch.eye(4)[label], []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        return self.network(images) + self.bias


@BOTH
@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "square"])  # which leaves idle queries out: test_square.py
def test_every_image_is_seen_as_the_library_shows_it_alone(name, norm):
    """Every iterate of every target, also where nothing comes of it: so every random number is the library's."""
    network, images = Exact(small_network()), torch.rand(5, 3, 8, 8, generator=seeded())
    images[4] = images[0]
    label, strength = 2, replace(QUICK, targets=3)
    labels = torch.full((5,), label)
    together = Unbroken(network, label)
    assert torch.equal(run(name, together, images, labels, norm=norm, strength=strength), images)
    singly = []

    def perturb(image: Tensor, label_: Tensor, seed: int) -> Tensor:
        singly.append(Unbroken(network, label))
        return directly(name, singly[-1], image, label_, seed, norm=norm, targets=3)

    alone(name, images, labels, perturb)
    for row, single in enumerate(singly):
        assert len(single.seen) == len(together.seen)
        for ours, theirs in zip(together.seen, single.seen, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs, atol=1e-6, rtol=0)


def test_every_run_of_an_attack_begins_elsewhere_for_every_image():
    network, images = Exact(small_network()), torch.rand(5, 3, 8, 8, generator=seeded())
    together = Unbroken(network, 2)
    run("apgd-t", together, images, torch.full((5,), 2), strength=Strength(steps=1, targets=3))
    starts = torch.stack([shown - images for shown in together.seen if not torch.equal(shown, images)][::2])
    assert starts.shape == (3, 5, 3, 8, 8)
    assert len({tuple(start.flatten().tolist()) for start in starts.flatten(0, 1)}) == 15


@EVERY
def test_the_seed_alone_decides(name):
    """Also whatever the global generators have drawn before, and in whatever grad mode."""
    network = small_network()
    images, labels = batch(network)
    first = run(name, network, images, labels, norm="l2")
    torch.rand(5)
    with torch.inference_mode():
        second = run(name, network, images.clone(), labels.clone(), norm="l2")
    with torch.no_grad():
        third = run(name, network, images, labels, norm="l2")
    assert torch.equal(first, second) and torch.equal(first, third)
    # FAB has a random start from the second restart on only
    assert torch.equal(run(name, network, images, labels, norm="l2", seed=8), first) == (name == "fab-t")


@EVERY
def test_networks_of_ours_whose_batch_norms_are_folded_are_attacked_in_inference_mode_too(name):
    network = build(Architecture("test_resnet", "small", {}, 3, 8, (0.5,) * 3, (0.3,) * 3, 4, None, False, False), seed=0).eval()
    images, labels = batch(network)
    with torch.inference_mode():
        inside = run(name, network, images.clone(), labels.clone())
    assert torch.equal(inside, run(name, network, images, labels))


# Side effects


def frozen_in_part() -> nn.Module:
    """A network in the middle of training: some gradients, a frozen layer in eval mode."""
    network = small_network().train()
    network[1].eval().requires_grad_(False)
    network[5].weight.grad = torch.ones_like(network[5].weight)
    return network


def trace(frame, event, argument):
    return None


def state(network: nn.Module) -> list:
    generators = torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]
    parameters = [(p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.tolist())) for p in network.parameters()]
    flags = [module.training for module in network.modules()]
    tensors = {key: value.tolist() for key, value in network.state_dict().items()}
    modes = sys.gettrace(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), list(warnings.filters)
    return [*copy.deepcopy([generators, parameters, flags, tensors]), modes]


@BOTH
@EVERY
@pytest.mark.parametrize("fails", [False, True], ids=["works", "raises"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_nothing_global_changes_even_when_the_model_raises(name, norm, fails, grad, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = frozen_in_part()
    images, labels = batch(small_network())
    images.requires_grad_()
    calls, seen = [], set()

    def count(*_):
        calls.append(1)
        seen.add((any(m.training for m in network.modules()), any(p.requires_grad for p in network.parameters())))
        if fails and len(calls) == 4:
            raise ZeroDivisionError

    network[5].register_forward_pre_hook(count)
    inputs = images.detach().clone(), labels.clone()
    previous = sys.gettrace()
    try:
        sys.settrace(trace)
        with torch.set_grad_enabled(grad):
            before = state(network)
            if fails:
                with pytest.raises(ZeroDivisionError):
                    run(name, network, images, labels, norm=norm)
            else:
                run(name, network, images, labels, norm=norm)
            after = state(network)
    finally:
        sys.settrace(previous)
    assert after == before and seen == {(False, False)}
    assert images.grad is None and images.requires_grad and torch.equal(images, inputs[0]) and torch.equal(labels, inputs[1])
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


# Errors


@BOTH
def test_what_an_attack_has_lost_to_nan_is_not_found(norm, monkeypatch):
    class Losing:
        def perturb(self, x: Tensor, y: Tensor) -> Tensor:
            found = x + 0.01
            found[1, 0, 0, 0] = torch.nan
            return found

    monkeypatch.setitem(ATTACKS, "square", Recipe(2, lambda *_: Losing()))
    images = torch.full((3, 1, 4, 4), 0.5)
    found = run("square", Constant(1.0, 0.0), images, torch.zeros(3, dtype=torch.int64), norm=norm, classes=2)
    assert torch.equal(found[1], images[1]) and torch.allclose(found[[0, 2]], images[[0, 2]] + 0.01)


@pytest.mark.parametrize("where", ["ball", "box"])
@BOTH
def test_an_attack_that_leaves_ball_or_box_is_a_failure_that_names_it(norm, where, monkeypatch):
    class Leaving:
        def perturb(self, x: Tensor, y: Tensor) -> Tensor:
            x = x.clone()
            x[1, 0, 0, 0] = 1 + 2e-5 if where == "box" else 0.05 + BLIND[norm] + 2e-5
            return x

    monkeypatch.setitem(ATTACKS, "square", Recipe(2, lambda *_: Leaving()))
    images = torch.full((3, 1, 4, 4), 0.5)
    images[1, 0, 0, 0] = 1.0 if where == "box" else 0.05
    with pytest.raises(Failure, match=f"square .*{norm} .*{BLIND[norm]}") as error:
        run("square", Constant(1.0, 0.0), images, torch.zeros(3, dtype=torch.int64), norm=norm, classes=2)
    assert "\n" not in str(error.value)


@BOTH
def test_rounding_outside_of_the_ball_is_projected_back(norm, monkeypatch):
    class Rounding:
        def perturb(self, x: Tensor, y: Tensor) -> Tensor:
            size = BLIND[norm] + 5e-6
            return x + (size / 4 if norm == "l2" else size)  # 16 pixels

    monkeypatch.setitem(ATTACKS, "square", Recipe(2, lambda *_: Rounding()))
    images = torch.full((3, 1, 4, 4), 0.5)
    attacked = run("square", Constant(1.0, 0.0), images, torch.zeros(3, dtype=torch.int64), norm=norm, classes=2)
    assert (NORMS[norm].size(attacked - images) <= BLIND[norm] + 3e-7).all()


def test_wrong_names_class_counts_and_images_are_errors_that_say_so():
    network = small_network()
    images, labels = batch(network)
    with pytest.raises(UserError, match=r"'apgd'.* apgd-ce, apgd-t, fab-t, square"):
        run("apgd", network, images, labels)
    with pytest.raises(UserError, match="choose from"):
        applicable("fab", 10)
    with pytest.raises(Failure, match=r"\(6, 4\).*\(6, 10\)"):
        run("apgd-ce", network, images, labels, classes=10)
    for wrong in (2 * images, -images, images * torch.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            run("apgd-ce", network, wrong, labels)


def test_the_librarys_warnings_reach_nobody():
    """A model without gradients makes the library warn; the diagnostics say that better, and with the figure."""
    assert not autoattack._SILENT.isEnabledFor(50) and autoattack._SILENT.name not in autoattack.logging.Logger.manager.loggerDict
