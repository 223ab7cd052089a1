"""Random numbers of an image's own: from its pixels and the seed, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from advml.attacks.per_image_rng import PerImageGenerator, drawn
from advml.attacks.threat_model import NORMS, ThreatModel


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(like.shape, generator=generator)


LEVELS = torch.randint(0, 256, (6, 3, 5, 4), generator=seeded())
IMAGES = LEVELS / 255
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)


def test_an_image_draws_what_a_generator_of_its_seed_gives_time_after_time():
    draws, generators = PerImageGenerator(3), [seeded(PerImageGenerator(3).seed_of(image)) for image in IMAGES]
    for _ in range(3):
        expected = torch.cat([uniform(IMAGES[:1], generator) for generator in generators])
        assert torch.equal(draws.draw(uniform, IMAGES), expected)
    assert len({generator.initial_seed() for generator in generators}) == 6


@EVERY_NORM
def test_the_batch_and_its_order_decide_nothing_and_whoever_leaves_takes_no_numbers_away(norm):
    rows, sample = torch.tensor([4, 1, 5]), NORMS[norm].sample
    everyone, some = PerImageGenerator(0), PerImageGenerator(0)
    for _ in range(2):
        assert torch.equal(some.draw(sample, IMAGES[rows]), everyone.draw(sample, IMAGES)[rows])
    assert torch.equal(some.draw(sample, IMAGES[5:]), everyone.draw(sample, IMAGES)[5:])


def test_equal_images_draw_alike_and_draw_once():
    thrice, once = PerImageGenerator(0), PerImageGenerator(0)
    for _ in range(2):
        found = thrice.draw(uniform, IMAGES[[0, 1, 0]])
        assert torch.equal(found[0], found[2]) and torch.equal(found[:2], once.draw(uniform, IMAGES[:2]))


@pytest.mark.parametrize("other", [PerImageGenerator(1), seeded(0)], ids=["another seed", "a generator"])
def test_another_seed_gives_other_numbers(other):
    assert not torch.equal(drawn(uniform, IMAGES, PerImageGenerator(0)), drawn(uniform, IMAGES, other))


def test_a_pixel_changed_gives_other_numbers():
    changed = IMAGES.clone()
    changed[2, 0, 0, 0] -= 1 / 255
    same = (PerImageGenerator(0).draw(uniform, changed) == PerImageGenerator(0).draw(uniform, IMAGES)).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize(
    "seen",
    [
        IMAGES.to(memory_format=torch.channels_last),
        IMAGES.double(),
        IMAGES.clone().requires_grad_(),
        IMAGES.repeat(2, 1, 1, 1)[6:],
        LEVELS * (1 / 255),
        IMAGES.nextafter(torch.tensor(0.0)),
    ],
    ids=["channels last", "double", "with a gradient", "a view", "times 1/255, as on CUDA", "one float below"],
)
def test_layout_precision_and_rounding_decide_nothing(seen):
    assert torch.equal(PerImageGenerator(0).draw(uniform, seen), PerImageGenerator(0).draw(uniform, IMAGES))
    assert [PerImageGenerator(0).seed_of(image) for image in seen] == [PerImageGenerator(0).seed_of(image) for image in IMAGES]


def test_global_generators_stay_as_they_are():
    before = torch.get_rng_state()
    PerImageGenerator(0).draw(uniform, IMAGES)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_image_draws_nothing():
    assert PerImageGenerator(0).draw(uniform, IMAGES[:0]).shape == (0, 3, 5, 4)


@EVERY_NORM
def test_starts_of_many_images_spread_as_those_of_a_generator(norm):
    """Means and variances of pixels, and correlations between pixels and between one image and the next."""
    count, threat_model = 3000, ThreatModel(norm, 0.3)
    images = torch.rand(count, 1, 1, 3, generator=seeded(1)) * 0.4 + 0.3
    own, common = (threat_model.random_start(images, generator=source) - images for source in (PerImageGenerator(0), seeded(0)))
    own, common = own.view(count, 3), common.view(count, 3)
    assert (own.mean(0).abs() < 4 * common.std(0) / count**0.5).all()
    torch.testing.assert_close(own.var(0), common.var(0), rtol=0.1, atol=0)
    following = torch.corrcoef(torch.cat([own[1:], own[:-1]], 1).T)
    assert (following - torch.eye(6)).abs().max() < 4 / count**0.5
