"""Attacks of libraries change nothing but the images that they return, and nothing either when the model raises."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from advml.attacks.autoattack import ATTACKS, Strength, attack
from advml.attacks.minimum_norm import MINIMAL, minimal_distances
from advml.attacks.threat_model import ThreatModel

EPSILON = {"linf": 0.04, "l2": 0.3}
CALLS = {
    f"{name}-{norm}": partial(attack, name, threat_model=ThreatModel(norm, epsilon), classes=4, strength=Strength(8, queries=60), seed=7)
    for name in ATTACKS
    for norm, epsilon in EPSILON.items()
}
CALLS |= {
    f"{name}-{norm}": partial(minimal_distances, name, norm=norm, steps=5, seed=7) for name, spec in MINIMAL.items() for norm in spec.norms
}


def frozen_in_part() -> nn.Module:
    """A network in the middle of training: some gradients, a frozen batch norm in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(384, 4)
        )
    network[1].eval().requires_grad_(False)
    network[5].weight.grad = torch.ones_like(network[5].weight)
    return network


def trace(frame, event, argument):
    return None


def state(network: nn.Module) -> list:
    """What a library might change: generators, gradients, flags, values, modes of torch, tracing, filters of warnings."""
    generators = torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]
    parameters = [(p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.tolist())) for p in network.parameters()]
    flags = [module.training for module in network.modules()]
    tensors = {key: value.tolist() for key, value in network.state_dict().items()}
    modes = sys.gettrace(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), list(warnings.filters)
    return [*copy.deepcopy([generators, parameters, flags, tensors]), modes]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("fails", [False, True], ids=["works", "raises"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_nothing_global_changes_even_when_the_model_raises(call, fails, grad, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, calls, seen = frozen_in_part(), [], set()
    images = 0.3 + 0.4 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = copy.deepcopy(network).eval()(images).argmax(1)
    images.requires_grad_()
    inputs = images.detach().clone(), labels.clone()

    def count(*_):
        calls.append(1)
        seen.add((any(m.training for m in network.modules()), any(p.requires_grad for p in network.parameters())))
        if fails and len(calls) == 4:
            raise ZeroDivisionError

    network[5].register_forward_pre_hook(count)
    previous = sys.gettrace()
    try:
        sys.settrace(trace)
        with torch.set_grad_enabled(grad):
            before = state(network)
            if fails:
                with pytest.raises(ZeroDivisionError):
                    call(network, images, labels)
            else:
                call(network, images, labels)
            after = state(network)
    finally:
        sys.settrace(previous)
    assert after == before and seen == {(False, False)}
    assert images.grad is None and images.requires_grad and torch.equal(images, inputs[0]) and torch.equal(labels, inputs[1])
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []
