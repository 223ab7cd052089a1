"""Frozen batch norms change no function, and step aside where they do not apply."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advml.attacks.frozen import FrozenBatchNorm
from advml.networks.models import Architecture, Network, build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unlike_new(module: nn.Module) -> nn.Module:
    """Statistics and parameters of batch norms as training leaves them: all different."""
    generator = seeded(1)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in filter(torch.is_floating_point, [*layer.parameters(), *layer.buffers()]):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return module.eval().requires_grad_(False)


def small_network(backbone: str, *, dual: bool = False) -> Network:
    architecture = Architecture(backbone, "small", {}, 3, 8, (0.5,) * 3, (0.3,) * 3, 10, 7, False, dual)
    return unlike_new(build(architecture, seed=0)).double()


def values_and_gradient(function, inputs: Tensor) -> tuple[Tensor, Tensor]:
    inputs = inputs.detach().requires_grad_()
    values = function(inputs)
    return values.detach(), torch.autograd.grad(values.square().sum(), inputs)[0]


def assert_frozen_is_the_same(function, inputs: Tensor) -> None:
    """To rounding in double precision, relative to the largest number."""
    expected = values_and_gradient(function, inputs)
    with FrozenBatchNorm():
        frozen = values_and_gradient(function, inputs)
    for ours, theirs in zip(frozen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


@pytest.fixture
def native_calls(monkeypatch) -> list[int]:
    """Counts PyTorch's own batch norms."""
    calls, original = [], torch.batch_norm
    monkeypatch.setattr(torch, "batch_norm", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050", "regnetx_002"])
def test_a_network_keeps_its_function(backbone):
    images = torch.rand(4, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    assert_frozen_is_the_same(small_network(backbone), images)


def test_dual_batch_norms_keep_the_adversarial_statistics():
    images = torch.rand(4, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    assert_frozen_is_the_same(small_network("test_resnet", dual=True), images)


LAYERS = {
    "one dimension": (nn.BatchNorm1d(3), (5, 3)),
    "a sequence": (nn.BatchNorm1d(3), (5, 3, 4)),
    "images": (nn.BatchNorm2d(3), (5, 3, 4, 4)),
    "volumes": (nn.BatchNorm3d(3), (5, 3, 2, 4, 4)),
    "without parameters": (nn.BatchNorm2d(3, affine=False), (5, 3, 4, 4)),
    "a large epsilon": (nn.BatchNorm2d(3, eps=0.3), (5, 3, 4, 4)),
    "without statistics": (nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 4)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_every_kind_of_batch_norm_keeps_its_function(layer, shape):
    layer = unlike_new(copy.deepcopy(layer)).double()
    assert_frozen_is_the_same(layer, torch.randn(shape, generator=seeded(), dtype=torch.float64))


def test_channels_last_features_stay_so():
    features = torch.randn(4, 3, 5, 5, generator=seeded()).to(memory_format=torch.channels_last)
    with FrozenBatchNorm():
        assert unlike_new(nn.BatchNorm2d(3))(features).is_contiguous(memory_format=torch.channels_last)


def test_pytorchs_own_batch_norm_does_not_run(native_calls):
    network, images = small_network("test_resnet"), torch.rand(2, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    native_calls.clear()  # building a network tries it out
    with FrozenBatchNorm():
        network(images)
    assert native_calls == []
    network(images)
    assert len(native_calls) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_a_batch_norm_in_train_mode_is_left_to_pytorch(native_calls):
    layer, features = unlike_new(nn.BatchNorm2d(3)).train(), torch.randn(4, 3, 5, 5, generator=seeded())
    expected = copy.deepcopy(layer)
    with FrozenBatchNorm():
        values = layer(features)
    assert native_calls == [1]
    assert torch.equal(values, expected(features))
    assert torch.equal(layer.running_mean, expected.running_mean) and layer.num_batches_tracked == expected.num_batches_tracked


def test_mixed_precision_is_left_to_pytorch(native_calls):
    layer, features = unlike_new(nn.BatchNorm2d(3)), torch.randn(4, 3, 5, 5, generator=seeded()).bfloat16()
    with FrozenBatchNorm():
        values = layer(features)
    assert native_calls == [1] and values.dtype == torch.bfloat16


def test_constants_are_computed_once_and_leave_with_the_context():
    layer, features = unlike_new(nn.BatchNorm2d(3)), torch.randn(4, 3, 5, 5, generator=seeded())
    with FrozenBatchNorm() as frozen:
        layer(features)
        constants = dict(frozen.constants)
        layer(features)
    assert list(constants) == [layer.running_var] and frozen.constants[layer.running_var] is constants[layer.running_var]
    layer.running_mean += 1
    with FrozenBatchNorm():
        torch.testing.assert_close(layer(features), F.batch_norm(features, layer.running_mean, layer.running_var, layer.weight, layer.bias))


def test_no_gradient_reaches_the_parameters():
    layer, features = nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 5, 5, generator=seeded()).requires_grad_()
    with FrozenBatchNorm():
        layer(features).sum().backward()
    assert features.grad is not None and layer.weight.grad is None and layer.bias.grad is None
