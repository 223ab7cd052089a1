"""Averages of the weights: equal to their formulas, selected and kept in place of the last weights, and resumed to the bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advml import config
from advml.core.device import Machine
from advml.data.datasets import Dataset, Split
from advml.models.layers import batch_norms
from advml.models.network import Network
from advml.recipes import REGIMES, SCHEMES
from advml.training.adversarial_steps import adversarial_training
from advml.training.averaging import AVERAGES, fresh_statistics
from advml.training.checkpoint import Checkpoint
from advml.training.tasks import finetuning_task, pretraining_task
from advml.training.trainer import train

CONFIG = config.load(Path(__file__).parents[2] / "params.yaml", ["attack.steps=1"])
CPU = Machine(torch.device("cpu"))


def settings(**changes: object) -> config.Phase:
    plain = {"epochs": 4, "batch_size": 16, "optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.0, "schedule": "constant"}
    return config.Phase(**(plain | {"keep": "last"} | changes))


@pytest.fixture
def small(dataset) -> Dataset:
    one, other = (Split(split.images[:n], split.labels[:n]) for split, n in ((dataset.train, 32), (dataset.validation, 16)))
    return replace(dataset, train=one, validation=other)


def epochs(network: Network, data: Dataset, phase: config.Phase, checkpoint: Checkpoint, *, head: bool = False):
    """The records of an attacked training, one at a time."""
    if head:
        task = finetuning_task(network, REGIMES["Partial-AT"], phase, data.train, CPU)
    else:
        task = pretraining_task(network, SCHEMES["CL"], phase, spec=CONFIG.views.contrastive, temperature=0.2)
    adversary = adversarial_training(CONFIG.attack, CONFIG.threat_model, phase)
    return train(task, data, phase, adversary=adversary, seed=0, machine=CPU, checkpoint=checkpoint)


def weights(network: Network) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_the_moving_average_follows_its_formula_buffers_included(make_network):
    network, decay = make_network(), 0.9
    average = AVERAGES["ema"](network, settings(average_decay=decay), epochs=1)
    expected = {key: value.double() for key, value in weights(network).items()}
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
            else:
                value.add_(1)
        average.after_step()
        for key, value in network.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value.double() if value.is_floating_point() else value.double()
    own = weights(network)
    with average.in_place():
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value.double(), expected[key], atol=1e-6, rtol=1e-5)
    assert all(torch.equal(value, own[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("head", [False, True])
def test_the_mean_over_epochs_is_kept_with_statistics_of_its_own(tmp_path, small, make_network, head):
    """The weights of epochs 3 and 4 of the same training without an average, whose path an average leaves alone."""
    plain, path = make_network(), []
    for _ in epochs(plain, small, settings(), Checkpoint(tmp_path / "plain", "x"), head=head):
        path.append(weights(plain))
    network, validated = make_network(), []
    for _ in epochs(network, small, settings(average="swa", average_start=0.5), Checkpoint(tmp_path / "swa", "x"), head=head):
        validated.append(weights(network))
    parameters = [key for key, _ in network.named_parameters()]
    assert all(torch.equal(validated[1][key], path[1][key]) for key in parameters)  # not begun
    for key in parameters:
        torch.testing.assert_close(network.state_dict()[key], (path[2][key] + path[3][key]) / 2, atol=1e-6, rtol=1e-5)
    moved = [key for key in path[3] if key.endswith("running_mean") and not torch.equal(network.state_dict()[key], path[3][key])]
    assert bool(moved) != head  # a head alone leaves the encoder's statistics as they are
    assert all(torch.equal(value, validated[3][key]) for key, value in network.state_dict().items())


def test_fresh_statistics_are_the_plain_means_over_the_batches(make_network):
    network, inputs = make_network().train(), []
    layer = batch_norms(network.encoder)[0]
    layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().double()))
    batches = torch.rand(3, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = layer.momentum
    with fresh_statistics(network) as count, torch.no_grad():
        for batch in batches:
            network(batch)
    assert count == len(batch_norms(network)) and layer.momentum == before and int(layer.num_batches_tracked) == 3
    means = torch.stack([given.mean((0, 2, 3)) for given in inputs]).mean(0)
    variances = torch.stack([given.var((0, 2, 3)) for given in inputs]).mean(0)
    torch.testing.assert_close(layer.running_mean.double(), means, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), variances, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_a_training_with_an_average_is_resumed_to_the_bit(tmp_path, small, make_network, average):
    """Left after every epoch, and gone on with by a fresh network."""
    phase = settings(average=average, average_start=0.25, keep="best")
    whole, parts = make_network(), Checkpoint(tmp_path / "parts", "x")
    history = list(epochs(whole, small, phase, Checkpoint(tmp_path / "whole", "x")))
    for finished in range(1, 4):
        begun = epochs(make_network(), small, phase, parts)
        for _ in range(finished):
            next(begun)
        begun.close()
    network = make_network()
    assert list(epochs(network, small, phase, parts)) == history
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in network.state_dict().items())
    if average == "swa":
        assert parts.load().best_epoch >= 2  # epochs before the average are not selected


def test_without_an_average_the_weights_themselves_are_validated(make_network):
    network = make_network()
    before, average = copy.deepcopy(weights(network)), AVERAGES["none"](network, settings(), epochs=3)
    average.after_step()
    average.after_epoch(1)
    with average.in_place():
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not average.state and average.first == 1
