"""A step is tried before training: what would end it in the first batch is one line, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from advml.core.errors import UserError
from advml.models.network import Architecture, Network, build
from advml.models.trial_step import try_step


def network(backbone: str = "test_resnet", *, stem: str = "small", image_size: int = 8, options: dict | None = None) -> Network:
    constants = (0.5,)
    return build(Architecture(backbone, stem, options or {}, 1, image_size, constants, constants, 3, 5, False, False), seed=0)


def test_a_batch_norm_that_gets_one_value_per_channel_is_refused_with_the_batch_size():
    one_pixel = network(stem="native")
    with pytest.raises(UserError) as stopped:
        try_step(one_pixel, count=1)
    message = str(stopped.value)
    assert "model.backbone = 'test_resnet'" in message and "1 x 1 x 8 x 8" in message and "batch_size of 2" in message
    assert "\n" not in message
    try_step(one_pixel, count=2)


def test_bfloat16_on_a_cpu_is_refused_where_its_gradients_are_wrong():
    """The last strided convolutions of the native stem get one pixel of an image of 8 x 8."""
    with pytest.raises(UserError, match=r"runtime\.precision = bf16: .*layer"):
        try_step(network(stem="native"), count=2, cpu_bfloat16=True)
    try_step(network(stem="small"), count=2, cpu_bfloat16=True)


def test_a_network_that_trains_is_as_before():
    tried = network(options={"drop_rate": 0.5})
    state = {key: value.clone() for key, value in tried.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    try_step(tried, count=2)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, state[key]) for key, value in tried.state_dict().items())
    assert all(parameter.grad is None for parameter in tried.parameters())


class Disconnected(nn.Module):
    """Takes no gradient."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(images.numpy()).flatten(1)[:, :1]


def test_what_fails_in_the_backward_pass_is_one_line():
    broken = network()
    broken.encoder = Disconnected()
    with pytest.raises(UserError, match="cannot be trained"):
        try_step(broken, count=2)
