"""Folded batch norms change no function, step aside where they do not apply, and leave no trace."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from advml.models.bn_folding import folded
from advml.models.layers import DualBatchNorm, batch_norms, clean_statistics, dual
from advml.models.network import Architecture, Network, build, under_attack

SHAPE = (3, 8, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unlike_new(module: nn.Module) -> nn.Module:
    """Statistics and parameters of batch norms as training leaves them: all different."""
    generator = seeded(1)
    for layer in batch_norms(module):
        for tensor in filter(torch.is_floating_point, [*layer.parameters(), *layer.buffers()]):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
    return module.eval().requires_grad_(False)


def small_network(backbone: str = "test_resnet", *, dual: bool = False) -> Network:
    architecture = Architecture(backbone, "small", {}, 3, 8, (0.5,) * 3, (0.3,) * 3, 10, 7, False, dual)
    return unlike_new(build(architecture, seed=0)).double()


def some_images(count: int = 4) -> Tensor:
    return torch.rand(count, *SHAPE, generator=seeded(), dtype=torch.float64)


def values_and_gradient(function, inputs: Tensor) -> tuple[Tensor, Tensor]:
    inputs = inputs.detach().requires_grad_()
    values = function(inputs)
    return values.detach(), torch.autograd.grad(values.square().sum(), inputs)[0]


def assert_the_same_when_folded(module: nn.Module, function, inputs: Tensor) -> None:
    """To rounding in double precision, relative to the largest number."""
    expected = values_and_gradient(function, inputs)
    with folded(module, SHAPE):
        found = values_and_gradient(function, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


def look_once(module: nn.Module) -> None:
    """Pairs are looked for, and tried out, the first time."""
    with folded(module, SHAPE):
        pass


@pytest.fixture
def native_calls(monkeypatch) -> list[int]:
    """Counts PyTorch's own batch norms."""
    calls, original = [], torch.batch_norm
    monkeypatch.setattr(torch, "batch_norm", lambda *args: calls.append(1) or original(*args))
    return calls


def assert_none_runs(module: nn.Module, function, calls: list[int]) -> None:
    """No batch norm of PyTorch's, once the pairs are known."""
    calls.clear()
    with folded(module, SHAPE):
        function(some_images())
    assert calls == []


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18", "test_efficientnet", "mobilenetv3_small_050", "regnetx_002", "test_vit"])
def test_a_network_keeps_its_function_and_its_batch_norms_do_not_run(backbone, native_calls):
    network = small_network(backbone)
    assert_the_same_when_folded(network.encoder, network, some_images())
    assert_none_runs(network.encoder, network, native_calls)
    network(some_images())
    assert len(native_calls) == len(batch_norms(network))


def test_dual_batch_norms_change_sides_within():
    """TRADES looks at the clean images while the network is attacked."""
    network = small_network(dual=True)
    for layer in network.modules():
        if isinstance(layer, DualBatchNorm):
            layer.clean.running_mean += 1
    assert_the_same_when_folded(network.encoder, network, some_images())
    with clean_statistics(network):
        assert_the_same_when_folded(network.encoder, network, some_images())
        expected = network(some_images())
    with folded(network.encoder, SHAPE), clean_statistics(network):
        assert torch.equal(network(some_images()), expected)


LAYERS = {
    "plain": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
    "a bias, groups, dilation, circular padding": (
        nn.Conv2d(3, 6, 3, groups=3, dilation=2, padding=2, padding_mode="circular"),
        nn.BatchNorm2d(6),
    ),
    "without parameters": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
    "a large epsilon": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.3)),
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_every_pair_keeps_its_function_and_is_folded(layers, native_calls):
    module = unlike_new(nn.Sequential(*copy.deepcopy(layers), nn.ReLU(inplace=True))).double()
    assert_the_same_when_folded(module, module, some_images())
    assert_none_runs(module, module, native_calls)


class Watched(nn.Module):
    """The output of the convolution goes to two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        return self.norm(features) + features


class Optional(Watched):
    """Attacks give the images alone: it takes the path without a mask."""

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        features = self.conv(images)
        return self.norm(features) if mask is not None else self.norm(features) + features


class Shared(Watched):
    """One convolution, with and without the norm."""

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)) + self.conv(images)


class Undecided(Watched):
    """Its path depends on the images: no tracer can follow."""

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)) if images.mean() > 0.4 else self.conv(images)


class Misled(Watched):
    """To a tracer the images are no tensor."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        return self.norm(features) + (features if isinstance(images, Tensor) else 0)


class Standardised(nn.Conv2d):
    """A convolution with a mind of its own."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(images, self.weight / self.weight.std())


UNTOUCHED = {
    "two uses of the output": Watched(),
    "two uses of the convolution": Shared(),
    "an argument with a default": Optional(),
    "control flow": Undecided(),
    "a tracer that is misled": Misled(),
    "a weight that a hook makes": nn.Sequential(prune.identity(nn.Conv2d(3, 3, 1).requires_grad_(False), "weight"), nn.BatchNorm2d(3)),
    "another kind of convolution": nn.Sequential(Standardised(3, 3, 1), nn.BatchNorm2d(3)),
    "no convolution before": nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)),
    "an activation between": nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
    "without statistics": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
}


@pytest.mark.parametrize("module", UNTOUCHED.values(), ids=UNTOUCHED)
def test_where_folding_would_be_wrong_or_is_unknown_pytorchs_own_runs(module, native_calls):
    module = unlike_new(copy.deepcopy(module)).double()
    expected = module(some_images())
    look_once(module)
    native_calls.clear()
    with folded(module, SHAPE):
        found = module(some_images())
    assert native_calls == [1] and torch.equal(found, expected)


def test_a_batch_norm_in_train_mode_is_left_to_pytorch(native_calls):
    module = unlike_new(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    module[1].train()
    expected = copy.deepcopy(module)
    look_once(module)
    native_calls.clear()
    with folded(module, SHAPE):
        found = module(some_images())
    assert native_calls == [1] and torch.equal(found, expected(some_images()))
    assert torch.equal(module[1].running_mean, expected[1].running_mean) and module[1].num_batches_tracked == 1


def test_constants_follow_the_network_and_leave_with_the_context():
    network, images = small_network(), some_images()
    layers = dict(network.named_modules())
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with folded(network.encoder, SHAPE):
        network(images)
        assert network.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert not any("forward" in vars(layer) for layer in layers.values())
    for layer in batch_norms(network):
        layer.running_mean += 1
    network.encoder.conv1.weight.data *= 2
    assert_the_same_when_folded(network.encoder, network, images)


def test_one_within_another_changes_nothing():
    """Nor does an error within."""
    network, images = small_network(), some_images()
    with pytest.raises(ZeroDivisionError), folded(network.encoder, SHAPE):
        once = network(images)
        with folded(network.encoder, SHAPE):
            assert torch.equal(network(images), once)
        assert torch.equal(network(images), once)
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in network.modules())


@pytest.mark.parametrize("layer", [0, 1], ids=["convolution", "norm"])
def test_a_layer_with_a_forward_of_its_own_keeps_it(layer):
    module = unlike_new(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    own = module[layer].forward
    module[layer].forward = lambda features: 2 * own(features)
    expected = module(some_images())
    with folded(module, SHAPE):
        assert torch.equal(module(some_images()), expected)
    assert torch.equal(module(some_images()), expected)


def test_hooks_see_what_they_saw():
    module = unlike_new(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    seen: list[Tensor] = []
    module[1].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    expected = module(some_images())
    with folded(module, SHAPE):
        module(some_images())
    torch.testing.assert_close(seen[1], expected)


def test_who_watches_the_convolution_sees_its_output(native_calls):
    module = unlike_new(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))).double()
    seen: list[Tensor] = []
    with folded(module, SHAPE):
        module(some_images())
    handle = module[0].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    native_calls.clear()
    with folded(module, SHAPE):
        module(some_images())
    assert native_calls == [1] and torch.equal(seen[0], module[0](some_images()))
    handle.remove()
    assert_none_runs(module, module, native_calls)


def test_a_module_that_changes_is_looked_at_anew():
    network = small_network()
    with folded(network.encoder, SHAPE):
        network(some_images())
    network.encoder.conv1 = nn.Conv2d(3, network.encoder.conv1.out_channels, 1).double()
    assert_the_same_when_folded(network.encoder, network, some_images())
    unlike_new(dual(network.encoder)).double()
    with clean_statistics(network):
        expected = network(some_images())
    with folded(network.encoder, SHAPE), clean_statistics(network):
        assert torch.equal(network(some_images()), expected)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_a_copy_made_within_is_a_network_like_any_other(backbone, native_calls):
    network = small_network(backbone)
    expected = network(some_images())
    with folded(network.encoder, SHAPE):
        twin = copy.deepcopy(network)
    native_calls.clear()
    torch.testing.assert_close(twin(some_images()), expected)
    assert len(native_calls) == len(batch_norms(twin))
    for layer in batch_norms(twin):
        layer.weight.data *= 2
    assert not torch.allclose(twin(some_images()), expected)
    assert torch.equal(network(some_images()), expected)


def test_nothing_is_left_behind_and_hooks_are_not_called_in_the_search():
    network, calls = small_network(), []
    network.encoder.register_forward_hook(lambda *_: calls.append(1))
    network.encoder.layer1.register_forward_hook(lambda *_: calls.append(1))
    before = {name: dict(vars(layer)) for name, layer in network.named_modules()}
    with folded(network.encoder, SHAPE):
        pass
    assert calls == [] and {name: dict(vars(layer)) for name, layer in network.named_modules()} == before


def test_a_network_is_freed_though_a_hook_of_its_layers_knows_it():
    network = small_network()
    network.encoder.bn1.register_forward_hook(lambda *_, own=network: own)
    with folded(network.encoder, SHAPE):
        pass
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_folded_in_inference_mode_a_gradient_is_possible():
    network, images = small_network(), some_images()
    expected = values_and_gradient(network, images)
    with torch.inference_mode(), folded(network.encoder, SHAPE), torch.inference_mode(False), torch.enable_grad():
        found = values_and_gradient(network, images)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_channels_last_features_stay_so():
    module = unlike_new(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)
    with folded(module, SHAPE):
        features = module(some_images().float().to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_mixed_precision_keeps_its_type():
    network, images = small_network().float(), some_images().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = network(images)
        with folded(network.encoder, SHAPE):
            found = network(images)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05 * float(expected.float().abs().max()))


def test_no_gradient_reaches_the_parameters():
    module, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval(), some_images().requires_grad_()
    with folded(module, SHAPE):
        module(images).sum().backward()
    assert images.grad is not None and all(parameter.grad is None for parameter in module.parameters())


def test_networks_are_folded_under_attack_and_other_modules_are_not(native_calls):
    network, images = small_network(), some_images()
    look_once(network.encoder)
    native_calls.clear()
    with under_attack(network):
        network(images)
    assert native_calls == []
    module = unlike_new(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    with under_attack(module):
        module(images)
    assert native_calls == [1]
