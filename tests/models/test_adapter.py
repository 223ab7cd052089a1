"""Behind the wall a module always has a gradient, its own where there is one, and its errors are one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from advml.core.errors import UserError
from advml.models.adapter import Foreign

IMAGES = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def logits(images: Tensor) -> Tensor:
    return images.reshape(len(images), -1)[:, :5] ** 2


def in_place(images: Tensor) -> Tensor:
    """autograd needs what is overwritten."""
    squeezed = torch.sigmoid(images)
    product = squeezed * squeezed
    squeezed.mul_(2)
    return logits(product)


@torch.inference_mode()
def inference(images: Tensor) -> Tensor:
    return logits(images)


def gradient(network: nn.Module) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    return torch.autograd.grad(network(images).sum(), images)[0]


def test_the_gradient_is_the_modules_own_however_often_it_is_asked_for():
    images, plain = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    found, wanted = Foreign(Lambda(logits))(images), logits(plain)
    assert torch.equal(found, wanted)
    for column in (0, 3):
        expected = torch.autograd.grad(wanted[:, column].sum(), plain, retain_graph=True)[0]
        assert expected.any() and torch.equal(torch.autograd.grad(found[:, column].sum(), images, retain_graph=True)[0], expected)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (in_place, "RuntimeError: one of the variables needed for gradient computation has been modified"),
        (lambda images: logits(torch.from_numpy(images.numpy())), "RuntimeError: Can't call numpy()"),
        (inference, None),
        (lambda images: logits(images.detach()), None),
        (lambda images: torch.zeros(3, 5, requires_grad=True) + 1, None),
    ],
    ids=["in place", "numpy", "inference mode", "detached", "ignored"],
)
def test_without_a_gradient_it_is_zero_and_the_reason_is_kept(function, reason):
    network = Foreign(Lambda(function))
    assert torch.equal(gradient(network), torch.zeros_like(IMAGES))
    assert network.gradient_error is None if reason is None else network.gradient_error.startswith(reason)


def test_what_is_no_tensor_is_told_also_where_gradients_alone_make_it_so():
    """As of models with auxiliary heads."""

    def several(images: Tensor) -> object:
        return (logits(images), logits(images)) if torch.is_grad_enabled() else logits(images)

    network = Foreign(Lambda(several), "mine:model")
    with torch.no_grad():
        assert len(network(IMAGES)) == len(IMAGES)
    with pytest.raises(UserError, match=r"^mine:model .*tuple .*3 images"):
        network(IMAGES.clone().requires_grad_())


@pytest.mark.parametrize("grad", [False, True])
def test_an_error_is_one_line_with_the_name_and_the_batch(grad):
    def fails(images: Tensor) -> Tensor:
        raise AssertionError("at most two\nimages")

    network = Foreign(Lambda(fails), "mine:model")
    with pytest.raises(UserError, match=r"^mine:model .*3x2x4x4 .*AssertionError: at most two$"):
        network(IMAGES.clone().requires_grad_(grad))


@pytest.mark.parametrize("grad", [False, True])
def test_lack_of_memory_is_no_property_of_the_module(grad):
    def exhausted(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Foreign(Lambda(exhausted))(IMAGES.clone().requires_grad_(grad))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.preserve_format])
def test_images_are_its_own_and_contiguous_unless_told_otherwise(memory_format):
    seen, before = [], IMAGES.clone()

    def writes(images: Tensor) -> Tensor:
        seen.append(images.is_contiguous())
        return logits(images.mul_(2))

    how = {} if memory_format is torch.contiguous_format else {"memory_format": memory_format}
    assert torch.equal(gradient(Foreign(Lambda(writes), **how))[:, 0, 0, 0], 8 * before[:, 0, 0, 0])
    assert torch.equal(IMAGES, before) and seen == [memory_format is torch.contiguous_format]
