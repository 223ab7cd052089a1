"""Optimisers: every parameter steps once, at its layer's share of the rate."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from advml import config
from advml.training.optimization import OPTIMIZERS, layer_groups, optimizer, set_learning_rate
from advml.training.tasks import Classification

# Backbone -> from the heads down: what begins each block.
TOPS = {
    "test_resnet": ["classifier", "encoder.layer4", "encoder.layer3", "encoder.layer2", "encoder.layer1", "encoder.conv1"],
    "resnet18": [
        "classifier",
        *(f"encoder.layer{stage}.{block}" for stage in (4, 3, 2, 1) for block in (1, 0)),
        "encoder.conv1",
    ],
    "test_vit": ["classifier", *(f"encoder.blocks.{block}" for block in range(5, -1, -1)), "encoder.cls_token"],
    "test_convnext": None,
    "test_efficientnet": None,
    "regnetx_002": None,
}


def phase(**changes: object) -> config.Phase:
    values = {"epochs": 1, "batch_size": 8, "optimizer": "adamw", "learning_rate": 0.1, "weight_decay": 0.01, "schedule": "constant"}
    return config.Phase(**{**values, "keep": "last", **changes})


@pytest.mark.parametrize("backbone", TOPS)
@pytest.mark.parametrize("dual", [False, True])
def test_every_learner_is_in_exactly_one_group_and_deeper_ones_learn_less(make_network, backbone, dual):
    network = make_network(backbone=backbone, dual_batch_norm=dual)
    learners = Classification(network).learners()
    groups = layer_groups(learners, network.encoder, layer_decay=0.5)
    counted = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert counted == Counter(id(parameter) for parameter in learners) and set(counted.values()) == {1}
    assert [group["share"] for group in groups] == [0.5**block for block in range(len(groups))] and len(groups) > 2
    assert {id(parameter) for parameter in groups[0]["params"]} == {id(parameter) for parameter in network.classifier.parameters()}


@pytest.mark.parametrize(("backbone", "tops"), [(name, tops) for name, tops in TOPS.items() if tops])
def test_blocks_come_from_the_top_and_the_stem_last(make_network, backbone, tops):
    network = make_network(backbone=backbone)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = layer_groups(Classification(network).learners(), network.encoder, layer_decay=0.5)
    inside = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    assert len(inside) == len(tops)
    assert all(any(name.startswith(f"{top}.") or name == top for name in block) for block, top in zip(inside, tops, strict=True))


def test_a_projection_head_is_a_head(make_network):
    network = make_network()
    learners = [*network.encoder.parameters(), *network.projection_head.parameters()]
    groups = layer_groups(learners, network.encoder, layer_decay=0.5)
    assert {id(parameter) for parameter in groups[0]["params"]} == {id(parameter) for parameter in network.projection_head.parameters()}


def test_rates_are_shares_of_the_schedules_rate(make_network):
    network = make_network()
    made = optimizer(phase(layer_decay=0.5), Classification(network).learners(), network)
    for rate in (0.1, 0.04):
        set_learning_rate(made, rate)
        assert [group["lr"] for group in made.param_groups] == pytest.approx([rate * 0.5**block for block in range(6)])
    assert {group["weight_decay"] for group in made.param_groups} == {0.01}


def test_without_decay_there_is_one_group_in_the_learners_order(make_network):
    """So that the states of an unfinished training still fit."""
    network = make_network()
    learners = Classification(network).learners()
    (group,) = optimizer(phase(), learners, network).param_groups
    assert all(ours is theirs for ours, theirs in zip(group["params"], learners, strict=True))
    set_learning_rate(optimizer(phase(), learners, network), 0.3)
    assert group["share"] == 1.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_of_equal_rates_step_like_one_group(make_network, name):
    """Grouping changes the rates and nothing else."""

    def step(grouped: bool) -> list[torch.Tensor]:
        network = make_network()
        learners = Classification(network).learners()
        groups = layer_groups(learners, network.encoder, layer_decay=1.0) if grouped else [{"params": learners, "share": 1.0}]
        made = OPTIMIZERS[name](groups, lr=0.1, weight_decay=0.01)
        for number in range(2):
            for place, parameter in enumerate(learners):
                parameter.grad = torch.full_like(parameter, (-1) ** place * (number + 1) / (place + 1))
            made.step()
        return [parameter.detach() for parameter in learners]

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(step(True), step(False), strict=True))


def test_a_module_that_is_no_encoder_needs_no_blocks_without_decay():
    layer = nn.Linear(2, 2)
    assert len(optimizer(phase(), list(layer.parameters()), layer).param_groups) == 1
