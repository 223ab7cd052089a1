"""Check by a trial step that a network can be trained."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

from advml.core.device import own_randomness
from advml.core.errors import UserError
from advml.models.network import Network


def try_step(network: Network, *, count: int, cpu_bfloat16: bool = False) -> None:
    """Try one adversarial training step on a copy: forward in train mode, gradients with respect to images and weights.

    Args:
        count: images in the smallest training batch, at least 1.
        cpu_bfloat16: whether training computes in bfloat16 on a CPU.
    Raises:
        UserError: a layer fails, such as a batch norm with one value per channel, or computes wrong gradients.
    """
    device = next(network.parameters()).device
    images = torch.full((count, *network.image_shape), 0.5, device=device, requires_grad=True)
    tried = copy.deepcopy(network).train()
    wanted = [images, *(parameter for parameter in tried.encoder.parameters() if parameter.requires_grad)]
    beyond: list[str] = []
    for name, module in tried.named_modules():
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and max(module.kernel_size) > 1:
            module.register_forward_pre_hook(functools.partial(_note_narrow, beyond, name))
    try:
        with own_randomness(0, device), torch.enable_grad():
            features = tried.features(images)
            outputs = [head(features) for head in (tried.projection_head, tried.classifier) if head is not None]
            torch.autograd.grad(sum(output.square().sum() for output in outputs), wanted, allow_unused=True)
    except Exception as error:  # timm's networks raise various errors
        architecture = network.architecture
        shape = " x ".join(map(str, images.shape))
        more = "; use a batch_size of 2 or more, or larger images" if count == 1 else ""
        raise UserError(
            f"model.backbone = {architecture.backbone!r} with model.stem = {architecture.stem} and model.options = {architecture.options} "
            f"cannot be trained on {shape} images ({type(error).__name__}: {' '.join(str(error).split())[:200]}){more}"
        ) from None
    if cpu_bfloat16 and beyond:
        raise UserError(
            f"runtime.precision = bf16: on CPUs, PyTorch computes wrong gradients for {beyond[0]}, whose input is narrower than its stride "
            "at this image size; use fp32, model.stem = small, or larger images"
        )


def _note_narrow(found: list[str], name: str, layer: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
    """Hook that records convolutions whose input is narrower than their stride.

    In bfloat16, oneDNN's weight gradients of these were infinite, or wrong by up to a factor of 10^7 (PyTorch 2.15).
    """
    if any(side < stride for side, stride in zip(inputs[0].shape[-2:], layer.stride, strict=True)):
        found.append(name)
