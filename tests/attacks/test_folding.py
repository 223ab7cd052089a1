"""Folding changes no function and leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from advml.attacks.folding import folded
from advml.models import Architecture, DualBatchNorm, Network, build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=seeded(), dtype=torch.float64)


def unlike_new(network: nn.Module) -> nn.Module:
    """Statistics and parameters of batch norms as training leaves them: all different."""
    generator = seeded(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in filter(lambda t: t is not None and t.is_floating_point(), [*module.parameters(), *module.buffers()]):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return network.eval().requires_grad_(False).double()


def timm_network(backbone: str, *, dual: bool = False) -> Network:
    return unlike_new(build(Architecture(backbone, "small", {}, 3, 8, (0.5,) * 3, (0.3,) * 3, 10, 7, False, dual), seed=0))


class Toy(nn.Module):
    """Two convolutions and two norms, wired by `run`."""

    def __init__(self, run) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.run = run

    def features(self, images: Tensor) -> Tensor:
        return self.run(self, images).mean((2, 3))


def replaced(network: nn.Module) -> int:
    return sum("forward" in vars(module) for module in network.modules())


def values_and_gradient(network: nn.Module) -> tuple[Tensor, Tensor]:
    images = pictures(4).requires_grad_()
    values = network.features(images)
    return values.detach(), torch.autograd.grad(values.square().sum(), images)[0]


def assert_same_within(network: nn.Module, *, modules: int) -> None:
    """Folding takes in `modules` convolutions and norms, and changes values and gradients by rounding only."""
    values, gradient = values_and_gradient(network)
    with folded(network, pictures(1)):
        assert replaced(network) == modules
        inside, slope = values_and_gradient(network)
    assert replaced(network) == 0
    torch.testing.assert_close(inside, values, atol=1e-9 * float(values.abs().max()), rtol=1e-9)
    torch.testing.assert_close(slope, gradient, atol=1e-9 * float(gradient.abs().max()), rtol=1e-9)


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18d", "mobilenetv3_small_050", "regnetx_002"])
def test_every_batch_norm_of_a_network_folds_and_its_function_stays(backbone):
    network = timm_network(backbone)
    assert_same_within(network, modules=2 * sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()))


@pytest.mark.parametrize("backbone", ["test_efficientnet", "tf_efficientnet_lite0", "test_vit"])
def test_a_network_of_which_some_or_nothing_folds_keeps_its_function(backbone):
    network = timm_network(backbone)
    with folded(network, pictures(1)):
        modules = replaced(network)
    assert_same_within(network, modules=modules)


def test_dual_batch_norms_fold_with_the_adversarial_statistics():
    network = timm_network("test_resnet", dual=True)
    assert_same_within(network, modules=2 * sum(isinstance(module, DualBatchNorm) for module in network.modules()))


def test_a_convolution_folds_with_the_norm_that_follows_it():
    assert_same_within(unlike_new(Toy(lambda t, x: t.norm(t.first(x)) + t.other(t.second(x)))), modules=4)


WIRINGS = {
    "a convolution that is read twice": lambda t, x: t.norm(y := t.first(x)) + y,
    "a convolution with two norms": lambda t, x: t.norm(y := t.first(x)) + t.other(y),
    "a convolution that runs twice": lambda t, x: t.norm(t.first(x)) + t.first(x.flip(1)),
    "a norm that runs twice": lambda t, x: t.norm(t.first(x)) + t.norm(t.second(x)),
    "a norm before its convolution": lambda t, x: t.first(t.norm(x)),
    "something between the two": lambda t, x: t.norm(t.first(x).relu()),
}


@pytest.mark.parametrize("run", WIRINGS.values(), ids=WIRINGS)
def test_what_cannot_fold_stays(run):
    assert_same_within(unlike_new(Toy(run)), modules=0)


def test_a_norm_without_statistics_stays():
    network = Toy(lambda t, x: t.norm(t.first(x)))
    network.norm = nn.BatchNorm2d(3, track_running_stats=False)
    assert_same_within(unlike_new(network), modules=0)


def test_a_norm_without_parameters_folds():
    network = Toy(lambda t, x: t.norm(t.first(x)))
    network.norm = nn.BatchNorm2d(3, affine=False)
    assert_same_within(unlike_new(network), modules=2)


def test_folding_ends_with_an_exception_and_touches_no_state():
    network = timm_network("test_resnet").requires_grad_(True)
    state, hooks = copy.deepcopy(network.state_dict()), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    with pytest.raises(ZeroDivisionError), folded(network, pictures(1)):
        raise ZeroDivisionError
    assert replaced(network) == 0
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()] == hooks
