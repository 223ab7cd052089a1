"""The threat model: projection, ascent and random start keep their promises for any images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from advml.attacks.threat_model import NORMS, ThreatModel

DUAL = {"linf": 1, "l2": 2}  # the order of the norm that measures gradients
BOTH = pytest.mark.parametrize("norm", sorted(NORMS))
EXAMPLES = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROUNDING = 2e-6  # float32, a few operations on numbers near 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def cases(draw) -> tuple[ThreatModel, Tensor, Tensor]:
    """A threat model, images (some pixels on the box), and points that may lie far outside of ball and box."""
    norm = draw(st.sampled_from(sorted(NORMS)))
    epsilon = draw(st.sampled_from([1e-3, 8 / 255, 0.15, 0.9, 3.0]))
    shape = draw(st.sampled_from([(1, 1, 1, 1), (3, 1, 4, 4), (2, 3, 5, 3)]))
    generator = seeded(draw(st.integers(0, 2**31)))
    images = (torch.rand(shape, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    distance = draw(st.sampled_from([0.0, 1e-4, 0.1, 1.0, 50.0]))
    return ThreatModel(norm, epsilon), images, images + distance * torch.randn(shape, generator=generator)


def assert_inside(adversarial: Tensor, images: Tensor, threat_model: ThreatModel) -> None:
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    delta = (adversarial - images).flatten(1).double()
    norms = delta.abs().amax(1) if threat_model.norm == "linf" else delta.square().sum(1).sqrt()
    assert (norms <= threat_model.epsilon + ROUNDING).all()


# Projection


@EXAMPLES
@given(cases())
def test_a_projected_point_lies_in_the_ball_and_in_the_box(case):
    threat_model, images, anywhere = case
    assert_inside(threat_model.project(anywhere, images), images, threat_model)


@EXAMPLES
@given(cases())
def test_projection_is_idempotent(case):
    threat_model, images, anywhere = case
    once = threat_model.project(anywhere, images)
    torch.testing.assert_close(threat_model.project(once, images), once, atol=2e-7, rtol=0)


@EXAMPLES
@given(cases())
def test_projection_leaves_a_point_of_the_threat_model_where_it_is(case):
    threat_model, images, _ = case
    inside = threat_model.random_start(images, generator=seeded(1))
    torch.testing.assert_close(threat_model.project(inside, images), inside, atol=ROUNDING, rtol=0)


def test_linf_projection_clips_each_pixel_to_ball_and_box():
    images, anywhere = torch.tensor([[0.5, 0.95, 0.02]]), torch.tensor([[0.9, 2.0, -1.0]])
    projected = ThreatModel("linf", 0.1).project(anywhere, images)
    torch.testing.assert_close(projected, torch.tensor([[0.6, 1.0, 0.0]]))


def test_l2_projection_shrinks_each_image_along_its_own_perturbation():
    images = torch.full((2, 2), 0.5)
    projected = ThreatModel("l2", 0.1).project(images + torch.tensor([[3.0, 4.0], [0.03, 0.04]]), images)
    torch.testing.assert_close(projected - images, torch.tensor([[0.06, 0.08], [0.03, 0.04]]))


# Ascent


def test_linf_ascent_moves_every_pixel_by_the_step_size_up_the_gradient():
    images = torch.full((1, 1, 2, 2), 0.5)
    gradient = torch.tensor([[[[3.0, -1e-9], [0.0, 7.0]]]])
    moved = ThreatModel("linf", 0.2).ascend(images, gradient, images, step_size=0.05) - images
    torch.testing.assert_close(moved, torch.tensor([[[[0.05, -0.05], [0.0, 0.05]]]]))


def test_l2_ascent_moves_each_image_by_the_step_size_along_its_gradient():
    images, gradient = torch.full((2, 1, 1, 2), 0.5), torch.tensor([[[[3.0, 4.0]]], [[[-1e-3, 0.0]]]])
    moved = ThreatModel("l2", 1.0).ascend(images, gradient, images, step_size=0.1) - images
    torch.testing.assert_close(moved, torch.tensor([[[[0.06, 0.08]]], [[[-0.1, 0.0]]]]))


@BOTH
def test_a_gradient_of_zero_moves_nothing_and_gives_no_nan(norm):
    images = torch.rand(3, 1, 4, 4, generator=seeded())
    moved = ThreatModel(norm, 0.1).ascend(images, torch.zeros_like(images), images, step_size=0.05)
    torch.testing.assert_close(moved, images)


@BOTH
def test_steepest_ascent_gains_the_dual_norm_of_the_gradient_per_unit_step(norm):
    gradient = torch.randn(5, 3, 4, 4, generator=seeded())
    direction = NORMS[norm].steepest(gradient)
    torch.testing.assert_close(NORMS[norm].size(direction), torch.ones(5))
    torch.testing.assert_close((direction * gradient).flatten(1).sum(1), gradient.flatten(1).norm(p=DUAL[norm], dim=1))


# Random start


@EXAMPLES
@given(cases())
def test_a_random_start_lies_in_the_ball_and_in_the_box(case):
    threat_model, images, _ = case
    assert_inside(threat_model.random_start(images, generator=seeded()), images, threat_model)


@BOTH
def test_a_random_start_follows_from_its_generator_alone(norm):
    images, threat_model = torch.rand(4, 3, 5, 5, generator=seeded()), ThreatModel(norm, 0.1)
    before = torch.get_rng_state()
    generator = seeded(7)
    first, second = (threat_model.random_start(images, generator=generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    torch.manual_seed(99)
    assert torch.equal(threat_model.random_start(images, generator=seeded(7)), first)


@BOTH
def test_a_random_start_is_the_same_whatever_the_memory_layout_and_precision(norm):
    images, threat_model = torch.rand(4, 3, 5, 5, generator=seeded()), ThreatModel(norm, 0.1)
    plain = threat_model.random_start(images, generator=seeded(7))
    assert torch.equal(threat_model.random_start(images.to(memory_format=torch.channels_last), generator=seeded(7)), plain)
    double = threat_model.random_start(images.double(), generator=seeded(7))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), plain)


def test_an_linf_random_start_is_uniform_in_every_pixel():
    images = torch.full((4000, 1, 1, 2), 0.5)
    delta = ThreatModel("linf", 0.3).random_start(images, generator=seeded()) - images
    for pixel in delta.flatten(1).T:
        assert kstest(pixel.numpy() / 0.3, "uniform", args=(-1, 2)).pvalue > 0.01


def test_an_l2_random_start_is_uniform_in_the_ball():
    """The share of a ball's volume within radius r is (r / epsilon)^d, and no direction is preferred."""
    images = torch.full((4000, 1, 2, 2), 0.5)
    delta = (ThreatModel("l2", 0.3).random_start(images, generator=seeded()) - images).flatten(1)
    radius = delta.norm(dim=1)
    assert kstest((radius / 0.3).numpy() ** 4, "uniform").pvalue > 0.01
    cosine = delta[:, 0] / radius  # in 4 dimensions (1 + cosine) / 2 is Beta(3/2, 3/2)
    assert kstest((1 + cosine.numpy()) / 2, "beta", args=(1.5, 1.5)).pvalue > 0.01


@BOTH
def test_size_is_the_norm_of_the_perturbation(norm):
    images = torch.full((2, 1, 1, 2), 0.5)
    adversarial = images + torch.tensor([[[[0.3, -0.4]]], [[[0.0, 0.0]]]])
    expected = {"linf": [0.4, 0.0], "l2": [0.5, 0.0]}[norm]
    torch.testing.assert_close(NORMS[norm].size(adversarial - images), torch.tensor(expected))
