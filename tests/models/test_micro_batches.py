"""A batch that passes the encoder in parts gives the features and the gradients of the whole one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from advml.core import ranks
from advml.models.layers import batch_norms, clean_statistics
from advml.models.micro_batches import in_parts
from advml.models.network import Network
from advml.recipes import classes
from advml.training.losses import contrastive_views


@pytest.fixture
def batch(dataset) -> tuple[Tensor, Tensor]:
    return dataset.train.images[:12].float() / 255, dataset.train.labels[:12]


def gradients(network: Network, batch: tuple[Tensor, Tensor], size: int | None) -> dict[str, Tensor]:
    """Of the contrastive loss of a batch and its negative, with respect to all weights and to the images."""
    network.micro_batch = size
    images, labels = batch[0].clone().requires_grad_(), batch[1]
    with clean_statistics(network):  # which ends before the backward pass
        first, second = network.embed(torch.cat([images, 1 - images])).chunk(2)
    contrastive_views(torch.stack([first, second]), classes(labels), temperature=0.2).mean().backward()
    found = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    network.zero_grad()
    return found | {"images": images.grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("size", [5, 1])
def test_a_contrastive_batch_stays_whole(make_network, batch, dual, size):
    network = make_network(dual_batch_norm=dual)
    for number, layer in enumerate(batch_norms(network)):  # the two sides of dual norms differ
        nn.init.uniform_(layer.running_mean, -0.1 * number, 0.1)
    network.eval()
    assert_same(gradients(network, batch, size), gradients(network, batch, None))


def test_batch_norms_in_train_mode_see_the_parts_and_count_them_once(make_network, batch):
    network = make_network().train()
    gradients(network, batch, 8)
    assert {int(layer.num_batches_tracked) for layer in batch_norms(network)} == {3}  # 24 images
    moved = [layer.running_mean.clone() for layer in batch_norms(network)]
    by_hand = make_network().train()
    with torch.no_grad():
        for part in torch.cat([batch[0], 1 - batch[0]]).split(8):
            by_hand.features(part)
    for layer, mean in zip(batch_norms(by_hand), moved, strict=True):
        torch.testing.assert_close(layer.running_mean, mean)
    assert all(layer.momentum == 0.1 and layer.training for layer in batch_norms(network))


@pytest.mark.parametrize("rank", range(3))
def test_each_of_several_processes_has_images_in_every_part(monkeypatch, rank):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    monkeypatch.setattr(ranks, "number", lambda: rank)
    with ranks.shared(7, perturbed=(4,)):  # of which parts of three rows may lack a process
        images = ranks.own(torch.arange(28.0)[:, None])
        seen: list[Tensor] = []
        in_parts(lambda part: seen.append(part) or part, images, size=1, layers=nn.Identity())
    assert len(seen) > 1 and min(map(len, seen)) > 0 and torch.equal(torch.cat(seen), images)
