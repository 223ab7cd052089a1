"""Objectives against slow transcriptions of their equations, a well-kept library, and closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from torch import Tensor
from transcriptions import supcon

from advml.core.errors import Failure, UserError
from advml.training.losses import (
    EMBEDDING_LOSSES,
    OBJECTIVES,
    contrastive,
    contrastive_views,
    cross_entropy,
    divergence,
    dlr,
    emp_ssl,
    loss_of_embeddings,
    margin,
)

TEMPERATURE = 0.2
GROUPS = {
    "classes": [0, 0, 1, 2, 1, 0, 2, 2],
    "pairs": [0, 1, 2, 3, 0, 1, 2, 3],
    "one class": [5] * 8,
    "with loners": [0, 0, 7, 8, 9, 1, 1, -3],
}


def embeddings(count: int = 8, size: int = 5, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


# The contrastive objective


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_contrastive_equals_a_literal_transcription_of_supcon_equation_2(groups, temperature):
    losses = contrastive(embeddings(), torch.tensor(groups), temperature=temperature)
    expected = supcon(embeddings(), groups, temperature).float()
    torch.testing.assert_close(losses, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("groups", "library"), [("classes", SupConLoss), ("pairs", NTXentLoss)])
def test_contrastive_and_its_gradient_equal_pytorch_metric_learnings(groups, library):
    labels = torch.tensor(GROUPS[groups])
    ours, theirs = embeddings().requires_grad_(), embeddings().requires_grad_()  # the library normalises by itself
    losses = contrastive(F.normalize(ours, dim=1), labels, temperature=TEMPERATURE).mean(), library(temperature=TEMPERATURE)(theirs, labels)
    torch.testing.assert_close(*losses)
    sum(losses).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("groups", [GROUPS["with loners"], [0], [*range(8)]], ids=["some", "one image", "all"])
def test_anchors_without_positives_have_no_loss_and_no_gradient_of_their_own(groups):
    z = embeddings(len(groups)).requires_grad_()
    losses = contrastive(z, torch.tensor(groups), temperature=TEMPERATURE)
    losses.sum().backward()
    paired = torch.tensor([groups.count(one) > 1 for one in groups])
    assert (losses > 0).tolist() == paired.tolist() and (losses[~paired] == 0).all()
    assert z.grad.isfinite().all() and bool(z.grad.any()) == bool(paired.any())


def test_a_lone_pair_has_no_negatives_and_so_no_loss():
    torch.testing.assert_close(contrastive(embeddings(2), torch.tensor([4, 4]), temperature=TEMPERATURE), torch.zeros(2))


def test_contrastive_does_not_overflow_at_a_tiny_temperature():
    z, groups = F.normalize(torch.eye(4).repeat(2, 1), dim=1), torch.arange(4).repeat(2)
    assert contrastive(z, groups, temperature=1e-3).abs().max() < 1e-6  # exp(1 / t) alone is infinite
    wrong = contrastive(z, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), temperature=1e-3)
    torch.testing.assert_close(wrong, torch.full((8,), 1e3))


def test_contrastive_is_right_under_bf16_autocast():
    z, groups = embeddings(64, 16).requires_grad_(), torch.arange(32).repeat(2)
    expected = contrastive(z, groups, temperature=0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = contrastive(z, groups, temperature=0.07)
    (gradient,) = torch.autograd.grad(under_autocast.mean(), z)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, expected)  # a bf16 product would be off by about 0.05
    assert torch.equal(gradient, torch.autograd.grad(expected.mean(), z)[0])


def test_contrastive_of_half_precision_embeddings_is_computed_in_float32():
    z, groups = embeddings().bfloat16(), torch.tensor(GROUPS["pairs"])
    expected = contrastive(z.float(), groups, temperature=TEMPERATURE)
    assert torch.equal(contrastive(z, groups, temperature=TEMPERATURE), expected)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 0, 1, 0]], ids=["instances", "classes"])
def test_the_pair_objective_is_the_mean_of_an_images_two_anchors(labels):
    first, second = embeddings(4, seed=1), embeddings(4, seed=2)
    losses = contrastive_views(torch.stack([first, second]), torch.tensor(labels), temperature=TEMPERATURE)
    anchors = supcon(torch.cat([first, second]), labels * 2, TEMPERATURE).float()
    torch.testing.assert_close(losses, (anchors[:4] + anchors[4:]) / 2)
    torch.testing.assert_close(losses.mean(), anchors.mean())


# Classification


def test_cross_entropy_of_two_classes_is_the_softplus_of_the_margin():
    gaps = torch.tensor([-30.0, -1.0, 0.0, 2.0, 50.0])
    losses = cross_entropy(torch.stack([torch.zeros(5), gaps], dim=1), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(losses, F.softplus(gaps))


def test_label_smoothing_spreads_its_mass_evenly_over_all_classes():
    logits, labels, mass = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1]), 0.3
    target = (1 - mass) * F.one_hot(labels, 4) + mass / 4
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=mass), -(target * logits.log_softmax(1)).sum(1))


def test_cross_entropy_of_half_precision_logits_is_computed_in_float32():
    logits, labels = torch.tensor([[8.0, 0.0, -3.0]]).bfloat16(), torch.tensor([0])
    loss = cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -logits.double().log_softmax(1)[:, 0].float())


def test_margin_is_the_best_other_logit_minus_the_own():
    logits = torch.tensor([[3.0, 1.0, -2.0], [3.0, 1.0, -2.0], [-5.0, -6.0, -9.0]])
    assert margin(logits, torch.tensor([0, 1, 2])).tolist() == [-2.0, 2.0, 4.0]


def test_margin_and_its_gradient_stay_finite_with_two_classes():
    logits = torch.tensor([[1.0, 4.0]], requires_grad=True)
    values = margin(logits, torch.tensor([0]))
    values.sum().backward()
    assert values.tolist() == [3.0] and logits.grad.tolist() == [[-1.0, 1.0]]


# Difference of logits ratio


def random_logits(count: int = 40, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % classes


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_dlr_equals_autoattacks_own(classes):
    from pyautoattack.autopgd_base import APGDAttack

    logits, labels = random_logits(classes=classes)
    theirs = APGDAttack.dlr_loss(None, logits, labels)
    torch.testing.assert_close(dlr(logits, labels), theirs)


def test_dlr_of_equal_logits_is_finite_with_a_finite_gradient():
    logits = torch.zeros(2, 4, requires_grad=True)
    values = dlr(logits, torch.tensor([0, 3]))
    values.sum().backward()
    assert torch.equal(values, torch.zeros(2)) and logits.grad.isfinite().all()


def test_dlr_of_two_classes_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"objective = 'dlr' .* 2 classes; .* ce, margin$"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_per_sample_and_in_float32(name):
    logits, labels = random_logits()
    values = OBJECTIVES[name](logits, labels)
    torch.testing.assert_close(torch.cat([OBJECTIVES[name](logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]), values)
    assert OBJECTIVES[name](logits.bfloat16(), labels).dtype == torch.float32


# Divergence


def test_the_divergence_is_that_of_torch():
    p, q = random_logits(seed=1)[0], random_logits(seed=2)[0]
    theirs = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(divergence(p, q), theirs)


def test_the_divergence_of_the_same_is_zero_and_certainty_keeps_it_finite():
    logits = torch.tensor([[200.0, 0.0, -200.0], [1.0, 2.0, 3.0]])
    torch.testing.assert_close(divergence(logits, logits), torch.zeros(2))
    assert divergence(logits, logits.flip(1)).isfinite().all()
    assert divergence(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32


def test_crops_that_agree_cost_what_their_spread_says():
    """Closed form: cosines of 1, and -1/2 sum_k log(1 + D / (N e^2) s_k^2) of the singular values s_k of the N x D embeddings."""
    z = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    expected = -200 - 0.5 * torch.log1p(4 / (6 * 0.2) * torch.linalg.svdvals(z.double()) ** 2).sum()
    losses = emp_ssl(z.expand(3, -1, -1), torch.arange(6), temperature=1.0)
    torch.testing.assert_close(losses.double(), expected.expand(6), atol=1e-3, rtol=1e-5)
    apart = emp_ssl(torch.stack([z, -z + 1e-3]), torch.arange(6), temperature=1.0)
    assert (apart > losses + 100).all()


# What every loss of embeddings promises


@pytest.mark.parametrize("loss", EMBEDDING_LOSSES)
def test_a_loss_of_embeddings_has_one_value_per_image_whatever_their_order(loss):
    views, groups = embeddings(24).unflatten(0, (3, 8)), torch.tensor(GROUPS["with loners"])
    losses, order = loss_of_embeddings(loss, views, groups, temperature=TEMPERATURE), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert losses.shape == (8,) and losses.isfinite().all()
    torch.testing.assert_close(loss_of_embeddings(loss, views[:, order], groups[order], temperature=TEMPERATURE), losses[order])


@pytest.mark.parametrize("wrong", [lambda views: views.flatten(0, 1).sum(1), lambda views: views.sum(), lambda views: views.sum((1, 2))])
def test_a_loss_of_embeddings_of_another_shape_fails(monkeypatch, wrong):
    monkeypatch.setitem(EMBEDDING_LOSSES, "new", lambda views, groups, *, temperature: wrong(views))
    with pytest.raises(Failure, match=r"'new' .*\(8,\)"):
        loss_of_embeddings("new", embeddings(16).unflatten(0, (2, 8)), torch.arange(8), temperature=TEMPERATURE)
