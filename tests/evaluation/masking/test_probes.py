"""A target gives gradients where there are any, zeros where there are none, and counts what passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from advml.attacks.pgd import pgd
from advml.attacks.threat_model import ThreatModel
from advml.evaluation.masking.probes import Target

IMAGES = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def square(images: Tensor) -> Tensor:
    return images.flatten(1) ** 2


def total(logits: Tensor) -> Tensor:
    return logits.sum(1)


def test_the_gradient_is_autograds():
    target = Target(Lambda(square))
    logits, values, gradient = target.gradient(total, IMAGES)
    assert torch.equal(logits, square(IMAGES)) and torch.equal(values, total(logits)) and torch.equal(gradient, 2 * IMAGES)
    assert (target.forward, target.backward, target.error) == (4, 4, None)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda images: square(images.detach()), None),
        (lambda images: square(images.detach()) + nn.Parameter(torch.zeros(4)), None),
        (lambda images: square(torch.from_numpy(images.numpy())), "Can't call numpy()"),
    ],
    ids=["detached", "elsewhere", "numpy"],
)
def test_a_model_without_gradient_has_gradient_zero(function, error):
    target = Target(Lambda(function))
    _, values, gradient = target.gradient(total, IMAGES)
    assert torch.equal(values, total(square(IMAGES))) and torch.equal(gradient, torch.zeros_like(IMAGES))
    assert target.error is None if error is None else error in target.error


def test_pgd_on_a_target_is_pgd_on_its_model():
    threat_model, seen = ThreatModel("linf", 0.1), []
    direct = pgd(lambda images: total(square(images)), IMAGES, threat_model=threat_model, steps=3, keep="best")
    through = pgd(Target(Lambda(square)).objective(total, watch=seen.append), IMAGES, threat_model=threat_model, steps=3, keep="best")
    assert torch.equal(direct, through) and len(seen) == 4 and torch.equal(seen[0], square(IMAGES))


def test_values_and_gradients_that_are_not_finite_do_not_reach_pgd():
    poles = Lambda(lambda images: torch.cat([images.flatten(1) * torch.nan, square(images)], dim=1))
    found = pgd(Target(poles).objective(total), IMAGES, threat_model=ThreatModel("l2", 0.1), steps=2, keep="best")
    assert torch.equal(found, IMAGES)
