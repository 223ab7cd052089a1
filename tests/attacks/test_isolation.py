"""Nothing of the process changes behind the guard, and a guarded model behaves as libraries expect."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advml.attacks.isolation import Logits, checked, frozen_copy, isolated
from advml.core.errors import Failure


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_all_generators_are_seeded_within_and_go_on_afterwards_as_if_nothing_had_been():
    layer = nn.Linear(2, 2)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    within = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), isolated(layer, seed=2**62 + 5):
            within.append(draws())
            raise ZeroDivisionError
    assert within[0] == within[1] != expected and draws() == expected


def test_a_cuda_that_starts_later_starts_from_the_callers_seed(monkeypatch):
    """torch keeps the last seed for a CUDA that is not in use yet."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", asked.append)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        with isolated(nn.Identity(), seed=5):
            pass
    assert asked[-1] == 11


def test_what_a_library_writes_into_logits_reaches_no_parameter():
    class Constant(nn.Module):
        logits = torch.tensor([1.0, 0.0])

        def forward(self, images: Tensor) -> Tensor:
            return self.logits.expand(len(images), -1)

    Logits(Constant(), like=torch.rand(3, 1, 2, 2))(torch.rand(3, 1, 2, 2)).fill_(7)
    assert Constant.logits.tolist() == [1, 0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_model_gets_type_and_layout_of_the_images_and_logits_are_float32(layout, kind):
    seen = []

    class Model(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((images.dtype, images.is_contiguous(memory_format=layout)))
            return images.flatten(1)[:, :2]

    like = torch.rand(3, 3, 4, 4, dtype=kind).contiguous(memory_format=layout)
    inputs = checked(like)
    assert inputs.is_contiguous() and inputs.dtype == torch.float32 and inputs is not like
    assert Logits(Model(), like=like)(inputs).dtype == torch.float32
    assert seen == [(kind, True)]


def test_an_empty_batch_does_not_reach_the_model_where_the_classes_are_known():
    class Model(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ZeroDivisionError

    like = torch.rand(3, 1, 2, 2)
    assert Logits(Model(), like=like, classes=5)(like[:0]).shape == (0, 5)


@pytest.mark.parametrize("classes", [None, 4])
def test_outputs_that_are_no_logits_are_a_failure(classes):
    like = torch.rand(3, 1, 2, 2)
    with pytest.raises(Failure, match=r"\(3, 1, 2, 2\).*\(3, (classes|4)\)"):
        Logits(nn.Identity(), like=like, classes=classes)(like)


def test_a_gradient_that_is_not_finite_is_zero():
    like = torch.full((3, 1, 2, 2), 0.5)
    like[:, 0, 0, 0] = 0
    images = like.clone().requires_grad_()
    Logits(Model(lambda images: images.flatten(1).sqrt()), like=like)(images).sum().backward()
    assert (images.grad[:, 0, 0, 0] == 0).all() and torch.allclose(images.grad.flatten(1)[:, 1:], torch.tensor(0.5**0.5))


class Model(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def test_a_borrowed_model_is_a_copy_in_eval_mode_and_frozen_or_itself_and_as_before():
    class Single(Model):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise NotImplementedError

    for kind in (Model, Single):
        model = kind(lambda images: images)
        before = model.layer.weight.detach().clone()
        with pytest.raises(ZeroDivisionError), frozen_copy(model) as own:
            assert (own is model) is (kind is Single) and not own.training and not own.layer.weight.requires_grad
            own.layer.weight.data += 1
            raise ZeroDivisionError
        assert torch.equal(model.layer.weight, before) and model.training and model.layer.weight.requires_grad


def test_the_frozen_model_still_has_a_gradient_where_it_has_one_and_none_is_made_up():
    like = torch.rand(3, 1, 2, 2)
    logits = Logits(nn.Flatten(), like=like)
    images = like.clone().requires_grad_()
    logits(images)[:, 1].sum().backward()
    assert images.grad.flatten(1).tolist() == [[0, 1, 0, 0]] * 3
    with torch.no_grad():
        assert not logits(images).requires_grad
