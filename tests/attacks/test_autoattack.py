"""The library's attacks: what the library gives for each image alone, for every number of classes, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

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


IGNORING = {
    "constant": lambda: Constant(3.0, 1.0, 0.0, -1.0),
    "tied": lambda: Constant(0.0, 0.0, 0.0, 0.0),
    "rounded": lambda: nn.Sequential(nn.Flatten(), nn.Threshold(2.0, 0.5), nn.Linear(64, 4)),  # a gradient of zero
}


@BOTH
@EVERY
@pytest.mark.parametrize("kind", IGNORING)
def test_a_model_that_ignores_its_images_stays_unbroken_and_nothing_warns(name, norm, kind, capfd):
    network, images = IGNORING[kind](), torch.rand(3, 1, 8, 8, generator=seeded())
    before = [parameter.tolist() for parameter in network.parameters()]
    labels = network(images).argmax(1)
    labels[2] = (labels[2] + 1) % 4
    assert torch.equal(run(name, network, images, labels, norm=norm), images)
    assert [parameter.tolist() for parameter in network.parameters()] == before  # the library writes into logits
    assert capfd.readouterr() == ("", "")


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


# Errors


@pytest.mark.parametrize("where", ["ball", "box"])
@BOTH
def test_an_attack_that_leaves_ball_or_box_is_a_failure_that_names_it(norm, where, planted):
    def leaving(x: Tensor) -> Tensor:
        x[1, 0, 0, 0] = 1 + 2e-5 if where == "box" else 0.05 + BLIND[norm] + 2e-5
        return x

    images = grey()
    images[1, 0, 0, 0] = 1.0 if where == "box" else 0.05
    with pytest.raises(Failure, match=f"square .*{norm} .*{BLIND[norm]}") as error:
        planted(leaving, images, norm=norm)
    assert "\n" not in str(error.value)


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


@pytest.fixture
def planted(monkeypatch):
    """planted(change, images) is what comes back where the library makes `change(images)` of them."""

    def run_planted(change: Callable[[Tensor], Tensor], images: Tensor, *, norm: str) -> Tensor:
        monkeypatch.setitem(ATTACKS, "square", Recipe(2, lambda *_: SimpleNamespace(perturb=lambda x, y: change(x.clone()))))
        return run("square", Constant(1.0, 0.0), images, torch.zeros(len(images), dtype=torch.int64), norm=norm, classes=2)

    return run_planted


def grey() -> Tensor:
    return torch.full((3, 1, 4, 4), 0.5)


@BOTH
def test_what_an_attack_has_lost_to_nan_is_not_found_and_rounding_is_projected_back(norm, planted):
    def losing(x: Tensor) -> Tensor:
        x += 0.01
        x[1, 0, 0, 0] = torch.nan
        return x

    found = planted(losing, grey(), norm=norm)
    assert torch.equal(found[1], grey()[1]) and torch.allclose(found[[0, 2]], grey()[[0, 2]] + 0.01)
    beyond = BLIND[norm] + 5e-6
    found = planted(lambda x: x + (beyond / 4 if norm == "l2" else beyond), grey(), norm=norm)  # 16 pixels
    assert (NORMS[norm].size(found - grey()) <= BLIND[norm] + 3e-7).all()
