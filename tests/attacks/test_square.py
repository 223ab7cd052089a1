"""Square takes what the library's own cannot: images of any size, and nothing but ties."""

from __future__ import annotations

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from advml.attacks.autoattack import Square, _starts


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(kind: type[SquareAttack], network: nn.Module, norm: str = "L2", *, epsilon: float = 1e-3, queries: int = 1) -> SquareAttack:
    return kind(network, norm=norm, n_queries=queries, eps=epsilon, seed=0, resc_schedule=False)


def linear_network(height: int, width: int) -> nn.Module:
    layer = nn.Linear(3 * height * width, 4)
    layer.weight.data = torch.randn(layer.weight.shape, generator=seeded(1)) * layer.in_features**-0.5
    layer.bias.data.zero_()
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False)


def problem(height: int, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    network, images = linear_network(height, width), torch.rand(6, 3, height, width, generator=seeded())
    return network, images, network(images).argmax(1)


@pytest.fixture(autouse=True)
def own_generator():
    """The library seeds the global one."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("size", [(3, 3), (4, 9), (12, 12), (14, 14), (18, 18), (19, 19), (24, 24), (12, 8), (8, 12), (28, 28), (7, 30)])
@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 0.5), ("L2", 8.0)])
def test_images_of_any_size_are_broken_inside_the_ball(norm, epsilon, size):
    network, images, labels = problem(*size)
    attack = made(Square, network, norm, epsilon=epsilon, queries=80)
    attacked = attack.perturb(images, labels)
    assert attacked.shape == images.shape and (network(attacked).argmax(1) != labels).any()
    delta = (attacked - images).flatten(1)
    assert (delta.norm(p={"Linf": torch.inf, "L2": 2}[norm], dim=1) <= epsilon + 1e-5).all()
    assert attack.predict is network


def test_only_sizes_on_which_the_library_fails_are_padded():
    network, failing = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9, 2)).requires_grad_(False), []
    for height in range(1, 34):
        for width in {height, max(1, height - 5), height + 3}:
            images = torch.full((1, 1, height, width), 0.5)
            try:
                made(SquareAttack, network).perturb(images, network(images).argmax(1))
            except (RuntimeError, ZeroDivisionError):
                failing.append((height, width))
            assert _starts(height, width) == ((height, width) not in failing)
    assert [height for height, width in failing if height == width] == [1, 2, 3, 4, 12, 14, 18, 19, 24]


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 0.3), ("L2", 4.0)])
@pytest.mark.parametrize("side", [8, 16, 28, 32])
def test_where_the_library_works_it_is_the_library_on_each_image_alone(norm, epsilon, side):
    network, images, labels = problem(side, side)
    library = made(SquareAttack, network, norm, epsilon=epsilon, queries=80)
    theirs = torch.cat([library.perturb(image, label) for image, label in zip(images.split(1), labels.split(1), strict=True)])
    ours = made(Square, network, norm, epsilon=epsilon, queries=80).perturb(images, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (ours != images).flatten(1).any(1).sum() >= 2


class Watched:
    """A model that keeps the images it is shown."""

    def __init__(self, network: nn.Module):
        self.network, self.seen = network, []

    def __call__(self, images: Tensor) -> Tensor:
        assert len(images)
        self.seen.extend(images.clone())
        return self.network(images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 0.1), ("L2", 1.0)])
def test_every_query_of_the_library_but_the_idle_ones_is_put_to_the_model(norm, epsilon, channels):
    """Also where nothing comes of it: the best found, after as many queries, is the library's, and what it has seen, too."""
    images = torch.rand(4, channels, 8, 8, generator=seeded()).round(decimals=1)
    layer = nn.Linear(channels * 64, 4, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=seeded(1)) / 8)
    network = lambda batch: layer(batch.double().flatten(1)).float()  # noqa: E731 - whose rounding does not depend on the batch
    labels = network(images).argmax(1)
    together = made(Square, network, norm, epsilon=epsilon, queries=300)
    together.init_hyperparam(images)
    torch.manual_seed(5)
    queries, best = together.attack_single_run(images.clone(), labels)
    idle = 0
    for row, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
        ours, theirs = (made(kind, Watched(network), norm, epsilon=epsilon, queries=300) for kind in (Square, SquareAttack))
        for attack in (ours, theirs):
            attack.init_hyperparam(image)
            torch.manual_seed(5)
            alone = attack.attack_single_run(image.clone(), label)
            assert alone[0] == queries[row]
            torch.testing.assert_close(alone[1], best[row : row + 1], atol=1e-6, rtol=0)
        left = iter(theirs.predict.seen)
        assert all(any(torch.equal(seen, shown) for shown in left) for seen in ours.predict.seen)  # in the same order
        shown = {tuple(seen.flatten().tolist()) for seen in theirs.predict.seen}
        assert shown == {tuple(seen.flatten().tolist()) for seen in ours.predict.seen}
        idle += len(theirs.predict.seen) - len(ours.predict.seen)
    # With more channels, all signs must agree; how many are idle depends on which proposals rounding lets the attack accept.
    assert (idle > 5) is ((norm, channels) == ("Linf", 1))


@pytest.mark.parametrize("size", [(4, 9), (12, 12), (14, 14), (24, 24), (12, 8)])
def test_company_decides_nothing_about_a_padded_image_either(size):
    network, images, labels = problem(*size)
    together = made(Square, network, epsilon=4.0, queries=80).perturb(images, labels)
    chosen = torch.tensor([4, 1, 2])
    fewer = made(Square, network, epsilon=4.0, queries=80).perturb(images[chosen], labels[chosen])
    torch.testing.assert_close(fewer, together[chosen], atol=1e-6, rtol=0)
    assert (together != images).flatten(1).any(1).sum() >= 2


def test_ties_at_the_first_try_leave_the_images_unbroken():
    def tied(images: Tensor) -> Tensor:
        return torch.zeros(len(images), 3)

    images, labels = torch.rand(2, 1, 8, 8, generator=seeded()), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="0 elements"):
        made(SquareAttack, tied).perturb(images, labels)
    assert torch.equal(made(Square, tied).perturb(images, labels), images)


def test_the_model_is_itself_again_after_an_error():
    def failing(images: Tensor) -> Tensor:
        raise ZeroDivisionError

    attack = made(Square, failing)
    with pytest.raises(ZeroDivisionError):
        attack.perturb(torch.rand(2, 1, 12, 12), torch.zeros(2, dtype=torch.int64))
    assert attack.predict is failing
