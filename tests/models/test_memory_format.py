"""A network is channels last where that is safe, and trains where it is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from advml.models.memory_format import memory_format, place
from advml.models.network import Architecture, Network, build

SAFE = {
    "enough channels": nn.Conv2d(16, 4, 1, stride=2),
    "stride 1": nn.Conv2d(3, 4, 1),
    "a larger kernel": nn.Conv2d(3, 4, 3, stride=2),
    "no convolution": nn.Linear(3, 4),
}
UNSAFE = {
    "one channel": nn.Conv2d(1, 4, 1, stride=2),
    "15 channels": nn.Conv2d(15, 4, 1, stride=2),
    "one strided direction": nn.Conv2d(3, 4, 1, stride=(1, 2)),
    "groups of few channels": nn.Conv2d(32, 4, 1, stride=2, groups=4),
    "three dimensions": nn.Conv3d(20, 4, 3),
    "somewhere inside": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1, stride=4))),
}


def network(backbone: str, *, stem: str, channels: int = 3, image_size: int = 32) -> Network:
    constants = (0.5,) * channels
    return build(Architecture(backbone, stem, {}, channels, image_size, constants, constants, 4, None, False, False), seed=0)


@pytest.mark.parametrize("module", SAFE.values(), ids=SAFE)
def test_channels_last_is_the_rule(module):
    assert memory_format(module) is torch.channels_last


@pytest.mark.parametrize("module", UNSAFE.values(), ids=UNSAFE)
def test_what_channels_last_does_not_suit_is_contiguous(module):
    module.to(memory_format=memory_format(module))
    assert memory_format(module) is torch.contiguous_format


@pytest.mark.parametrize(
    "backbone", ["test_resnet", "resnet18", "test_convnext", "test_efficientnet", "mobilenetv3_small_050", "regnetx_002"]
)
def test_small_stems_stay_channels_last(backbone):
    """The layout is part of what a study's numbers follow from, to the last bit."""
    placed = place(network(backbone, stem="small", channels=1, image_size=8), torch.device("cpu"))
    weights = [parameter for parameter in placed.parameters() if parameter.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_an_unsafe_network_never_sees_channels_last(channels, layout):
    placed = place(network("repvgg_a0", stem="native", channels=channels), torch.device("cpu"))
    seen = []
    for module in placed.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda module, inputs: seen.extend([inputs[0].stride(), module.weight.stride()]))
    images = torch.empty_strided((2, channels, 32, 32), (1024 * channels, 1, 32 * channels, channels)).zero_()
    placed(images.to(memory_format=layout))
    assert seen and all(strides[1] != 1 or strides[-1] == strides[-2] == 1 for strides in seen)
    expected = torch.empty(2, channels, 32, 32).stride()
    assert seen[0] == expected


STEP = """
import torch
from torch import nn
from advml.models.memory_format import memory_format, place
network = place(nn.Sequential(nn.Conv2d(3, 48, 1, stride=2), nn.Flatten(), nn.Linear(48 * 256, 4)), torch.device("cpu"))
pictures = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format(network))
def gradients():
    images = pictures.to(network[2].weight.dtype).requires_grad_()
    wanted = [images, *network.parameters()]
    return [gradient.double() for gradient in torch.autograd.grad(network(images).square().sum(), wanted)]
rounded = [gradients() for _ in range(3)][-1]
network.double()
print(max(float((ours - exact).abs().max() / exact.abs().max().clamp_min(1e-6)) for ours, exact in zip(rounded, gradients())))
"""


def test_training_an_unsafe_network_gives_the_right_gradients():
    """In a process of its own, which the fault would end, under the instruction set that shows it best."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-500:]}"
    assert float(done.stdout) < 1e-3
