"""Tasks: which loss, on which weights, in which mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from advml import config
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.models.layers import DualBatchNorm, batch_norms
from advml.models.network import under_attack
from advml.recipes import REGIMES, instances
from advml.training.losses import OBJECTIVES, cross_entropy
from advml.training.tasks import (
    Classification,
    Contrastive,
    HeadOnly,
    classification_objective,
    contrastive_objective,
    finetuning_task,
)

CONFIG = config.load(Path(__file__).parents[2] / "params.yaml")
CPU = Machine(torch.device("cpu"))
SHIFT = config.View(shift=0.2, brightness=0.3)
INDEX = torch.arange(24)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images(dataset) -> Tensor:
    return dataset.train.images[INDEX].float() / 255


@pytest.fixture
def labels(dataset) -> Tensor:
    return dataset.train.labels[INDEX]


@pytest.fixture
def adversarial(images) -> Tensor:
    return (images + 0.1 * (torch.rand(images.shape, generator=generator(9)) - 0.5)).clamp(0, 1)


def clean_loss(task, images: Tensor, labels: Tensor, index: Tensor, *, generator: torch.Generator) -> Tensor:
    """Of views that are drawn for it."""
    return task.clean_loss(task.views(images, generator=generator), labels, index)


def contrastive_task(network) -> Contrastive:
    return Contrastive(network, spec=SHIFT, temperature=0.2, groups=instances)


# Which loss


def test_classification_without_views_draws_nothing(make_network, images, labels):
    network, source = make_network(), generator()
    losses = clean_loss(Classification(network), images, labels, INDEX, generator=source)
    assert torch.equal(losses, cross_entropy(network(images), labels))
    assert torch.equal(source.get_state(), generator().get_state())


# What the adversary ascends


def test_the_clean_embedding_is_computed_once_and_no_gradient_reaches_it(make_network, images, adversarial, labels):
    network = make_network().eval()
    passes = []
    network.encoder.register_forward_hook(lambda *_: passes.append(1))
    objective = contrastive_objective(network, images, instances(labels), temperature=0.2)
    for _ in range(3):
        objective(adversarial)
    assert len(passes) == 1 + 3
    network.requires_grad_(False)
    images, adversarial = images.requires_grad_(), adversarial.requires_grad_()
    contrastive_objective(network, images, instances(labels), temperature=0.2)(adversarial).sum().backward()
    assert adversarial.grad.abs().sum() > 0 and images.grad is None


def test_the_objective_of_classification_may_be_another_loss(make_network, images, adversarial, labels):
    network = make_network().eval()
    for name, objective in OBJECTIVES.items():
        values = classification_objective(network, labels, loss=name)(adversarial)
        assert torch.equal(values, objective(network(adversarial), labels)) and values.shape == labels.shape
    with pytest.raises(UserError, match=r"'hinge'.*ce, margin, dlr$"):
        classification_objective(network, labels, loss="hinge")


# TRADES: the divergence between the image's and the adversarial image's prediction


def test_the_clean_prediction_is_computed_once_per_attack_and_no_gradient_reaches_it(make_network, images, adversarial, labels):
    network, passes = make_network().eval(), []
    network.encoder.register_forward_hook(lambda *_: passes.append(1))
    objective = Classification(network, loss="trades").training_objective(images.requires_grad_(), labels)
    for _ in range(3):
        objective(adversarial.requires_grad_()).sum().backward()
    assert len(passes) == 1 + 3
    assert images.grad is None and adversarial.grad.abs().sum() > 0


def test_the_two_terms_of_trades_use_their_own_statistics(make_network, images, adversarial, labels):
    network = make_network(dual_batch_norm=True).train()
    layers = [module for module in network.modules() if isinstance(module, DualBatchNorm)]
    task = Classification(network, loss="trades")
    task.adversarial_loss(images, adversarial, labels)
    assert {(int(layer.clean.num_batches_tracked), int(layer.adversarial.num_batches_tracked)) for layer in layers} == {(1, 1)}
    for layer in layers:
        layer.clean.running_var.mul_(3)
    with under_attack(network):
        torch.testing.assert_close(task.training_objective(images, labels)(adversarial), task.adversarial_loss(images, adversarial, labels))


# Statistics


@pytest.mark.parametrize("dual", [False, True])
def test_frozen_statistics_put_the_encoders_batch_norms_alone_into_eval_mode(make_network, dual):
    network = make_network(dual_batch_norm=dual, options={"drop_rate": 0.5})
    Classification(network, frozen_statistics=True).train_mode()
    assert {type(module) for module in network.modules() if not module.training} == {type(layer) for layer in batch_norms(network.encoder)}
    assert not any(layer.training for layer in batch_norms(network.encoder))
    Classification(network).train_mode()
    assert all(module.training for module in network.modules())


# Who learns


@pytest.mark.parametrize(("regime", "kind"), [("ST", HeadOnly), ("AT", HeadOnly), ("Partial-AT", HeadOnly), ("Full-AT", Classification)])
def test_a_regime_fine_tunes_the_head_or_everything_without_views(make_network, dataset, regime, kind):
    phase = CONFIG.regimes[regime].model_copy(update={"label_smoothing": 0.2})
    task = finetuning_task(make_network(), REGIMES[regime], phase, dataset.train, CPU)
    assert type(task) is kind and task.spec is None and task.label_smoothing == 0.2


# Scores and statistics


def test_accuracy_scores_are_1_where_the_prediction_is_right(make_network, images, adversarial, labels):
    network = make_network().eval()
    task = Classification(network)
    right = (network(images).argmax(1) == labels).float()
    assert torch.equal(task.clean_score(images, labels, generator=generator()), right)
    assert torch.equal(task.adversarial_score(images, adversarial, labels), (network(adversarial).argmax(1) == labels).float())
    assert task.metric == "accuracy" and task.larger_is_better


def test_contrastive_scores_are_losses(make_network, images, adversarial, labels):
    task = contrastive_task(make_network().eval())
    clean = clean_loss(task, images, labels, INDEX, generator=generator())
    assert torch.equal(task.clean_score(images, labels, generator=generator()), clean)
    assert torch.equal(task.adversarial_score(images, adversarial, labels), task.adversarial_loss(images, adversarial, labels))
    assert task.metric == "loss" and not task.larger_is_better
