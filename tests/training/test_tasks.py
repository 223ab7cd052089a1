"""Tasks: which loss, on which weights, in which mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advml import config
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.data.augment import view
from advml.models.layers import DualBatchNorm, batch_norms
from advml.models.network import under_attack
from advml.recipes import REGIMES, SCHEMES, classes, instances
from advml.training.losses import OBJECTIVES, contrastive_views, cross_entropy, divergence
from advml.training.tasks import (
    Classification,
    Contrastive,
    HeadOnly,
    classification_objective,
    contrastive_objective,
    finetuning_task,
    pretraining_task,
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


def contrastive_task(network, groups=instances, spec=SHIFT) -> Contrastive:
    return Contrastive(network, spec=spec, temperature=0.2, groups=groups)


def head_only(network, dataset, **phase) -> HeadOnly:
    settings = CONFIG.regimes["Partial-AT"].model_copy(update=phase)
    task = finetuning_task(network, REGIMES["Partial-AT"], settings, dataset.train, CPU)
    task.train_mode()
    return task


# Which loss


def test_classification_is_cross_entropy_of_one_view(make_network, images, labels):
    network = make_network()
    expected = cross_entropy(network(view(images, SHIFT, generator=generator())), labels)
    losses = clean_loss(Classification(network, spec=SHIFT), images, labels, INDEX, generator=generator())
    assert torch.equal(losses, expected) and losses.shape == labels.shape


def test_classification_without_views_draws_nothing(make_network, images, labels):
    network, source = make_network(), generator()
    losses = clean_loss(Classification(network), images, labels, INDEX, generator=source)
    assert torch.equal(losses, cross_entropy(network(images), labels))
    assert torch.equal(source.get_state(), generator().get_state())


@pytest.mark.parametrize("groups", [instances, classes])
def test_the_contrastive_clean_loss_is_of_two_different_views(make_network, images, labels, groups):
    network, source = make_network(), generator()
    first, second = (view(images, SHIFT, generator=source) for _ in range(2))
    assert not torch.equal(first, second)
    together = network.embed(torch.cat([first, second]))
    expected = contrastive_views(together.unflatten(0, (2, 24)), groups(labels), temperature=0.2)
    task = contrastive_task(network, groups)
    assert torch.equal(clean_loss(task, images, labels, INDEX, generator=generator()), expected)


@pytest.mark.parametrize("groups", [instances, classes])
def test_the_contrastive_adversarial_loss_pairs_the_plain_image_with_the_adversarial_one(make_network, images, adversarial, labels, groups):
    network = make_network()
    together = network.embed(torch.cat([images, adversarial]))
    expected = contrastive_views(together.unflatten(0, (2, 24)), groups(labels), temperature=0.2)
    assert torch.equal(contrastive_task(network, groups).adversarial_loss(images, adversarial, labels), expected)


def test_label_smoothing_reaches_every_classification_loss_but_neither_attack_nor_score(make_network, dataset, images, adversarial, labels):
    network = make_network().eval()
    plain, smooth = Classification(network), Classification(network, label_smoothing=0.3)
    head = head_only(network, dataset, label_smoothing=0.3)
    expected = F.cross_entropy(network(images), labels, label_smoothing=0.3, reduction="none")
    for task in (smooth, head):
        torch.testing.assert_close(clean_loss(task, images, labels, INDEX, generator=generator()), expected)
        attacked = F.cross_entropy(network(adversarial), labels, label_smoothing=0.3, reduction="none")
        assert torch.equal(task.adversarial_loss(images, adversarial, labels), attacked)
        assert torch.equal(task.objective(images, labels)(adversarial), plain.objective(images, labels)(adversarial))
        assert torch.equal(
            task.clean_score(images, labels, generator=generator()), plain.clean_score(images, labels, generator=generator())
        )


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


def trades(network, dataset) -> dict[str, Classification]:
    phase = CONFIG.regimes["Partial-AT"].model_copy(update={"loss": "trades", "label_smoothing": 0.3})
    head = finetuning_task(network, REGIMES["Partial-AT"], phase, dataset.train, CPU)
    return {"both": Classification(network, loss="trades", label_smoothing=0.3), "head": head}


@pytest.mark.parametrize("kind", ["both", "head"])
def test_trades_adds_the_divergence_from_the_clean_prediction(make_network, dataset, images, adversarial, labels, kind):
    network = make_network().eval()
    task, expected = trades(network, dataset)[kind], divergence(network(images), network(adversarial))
    torch.testing.assert_close(task.adversarial_loss(images, adversarial, labels), expected)
    torch.testing.assert_close(task.training_objective(images, labels)(adversarial), expected)
    clean = F.cross_entropy(network(images), labels, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(clean_loss(task, images, labels, INDEX, generator=generator()), clean, rtol=1e-5, atol=1e-5)
    assert torch.equal(task.objective(images, labels)(adversarial), cross_entropy(network(adversarial), labels))


def test_the_divergence_learns_through_both_predictions(make_network, images, adversarial, labels):
    """As in the authors' code: with p(x) held fixed the gradient would be another one."""
    network = make_network().eval()
    weight = network.classifier.weight

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), weight)[0]

    ours = gradient(Classification(network, loss="trades").adversarial_loss(images, adversarial, labels))
    torch.testing.assert_close(ours, gradient(divergence(network(images), network(adversarial))))
    assert (ours - gradient(divergence(network(images).detach(), network(adversarial)))).abs().max() > 1e-3 * ours.abs().max()


def test_the_clean_prediction_is_computed_once_per_attack_and_no_gradient_reaches_it(make_network, images, adversarial, labels):
    network, passes = make_network().eval(), []
    network.encoder.register_forward_hook(lambda *_: passes.append(1))
    objective = Classification(network, loss="trades").training_objective(images.requires_grad_(), labels)
    for _ in range(3):
        objective(adversarial.requires_grad_()).sum().backward()
    assert len(passes) == 1 + 3
    assert images.grad is None and adversarial.grad.abs().sum() > 0


def test_at_the_image_itself_the_divergence_is_flat(make_network, images, labels):
    """Why `loss: trades` needs a random start."""
    network = make_network().eval()
    task, start = Classification(network, loss="trades"), images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(task.training_objective(images, labels)(start).sum(), start)
    assert gradient.abs().max() < 1e-6


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


# The head alone


def test_stored_features_follow_the_index_of_a_shuffled_batch(make_network, dataset):
    network = make_network()
    task = head_only(network, dataset)
    index = torch.tensor([50, 3, 17])
    images, labels = dataset.train.images[index].float() / 255, dataset.train.labels[index]
    losses = clean_loss(task, images, labels, index, generator=generator())
    torch.testing.assert_close(losses, cross_entropy(network(images), labels), rtol=1e-5, atol=1e-5)


def test_a_head_alone_keeps_the_encoder_in_eval_mode_and_without_gradients(make_network, dataset, images, adversarial, labels):
    network = make_network()
    task = head_only(network, dataset)
    network.train()
    task.train_mode()
    assert not any(module.training for module in network.encoder.modules())
    clean_loss(task, images, labels, INDEX, generator=generator()).mean().backward()
    task.adversarial_loss(images, adversarial, labels).mean().backward()
    assert all(parameter.grad is None for parameter in network.encoder.parameters())
    assert all(parameter.grad is not None for parameter in network.classifier.parameters())


# Who learns


def test_learners_are_the_encoder_and_the_head_in_use(make_network, dataset):
    network = make_network()

    def names(task) -> set[str]:
        known = {parameter: name for name, parameter in network.named_parameters()}
        learners = [known[parameter].split(".")[0] for parameter in task.learners()]
        assert len(task.learners()) == len(set(task.learners()))  # listed twice, a parameter would step twice
        return set(learners)

    assert names(Classification(network)) == {"encoder", "classifier"}
    assert names(contrastive_task(network)) == {"encoder", "projection_head"}
    assert names(head_only(network, dataset)) == {"classifier"}


@pytest.mark.parametrize(
    ("name", "kind", "groups"), [("SL", Classification, None), ("CL", Contrastive, instances), ("SCL", Contrastive, classes)]
)
def test_a_scheme_pretrains_its_own_task(make_network, name, kind, groups):
    task = pretraining_task(make_network(), SCHEMES[name], CONFIG.pretrain[name], spec=SHIFT, temperature=0.3)
    assert type(task) is kind and task.spec == SHIFT
    if groups:
        assert task.groups is groups and task.temperature == 0.3


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


@pytest.mark.parametrize("make_task", [Classification, contrastive_task], ids=["classification", "contrastive"])
def test_dual_batch_norm_learns_clean_statistics_from_clean_batches_and_adversarial_ones_from_attacked(
    make_network, images, adversarial, labels, make_task
):
    network = make_network(dual_batch_norm=True).train()
    task = make_task(network)
    layers = [module for module in network.modules() if isinstance(module, DualBatchNorm)]
    assert layers

    def moved() -> tuple[int, int]:
        clean, attacked = ({int(getattr(layer, kind).num_batches_tracked) for layer in layers} for kind in ("clean", "adversarial"))
        assert len(clean) == len(attacked) == 1
        return clean.pop(), attacked.pop()

    clean_loss(task, images, labels, INDEX, generator=generator())
    assert moved() == (1, 0)
    task.adversarial_loss(images, adversarial, labels)
    assert moved() == (1, 1)
    with under_attack(network):
        task.objective(images, labels)(adversarial)
    assert moved() == (1, 1)
