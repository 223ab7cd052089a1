"""Train one model with several processes, started by torchrun; each has a device, and processes a part of every batch.

A batch is split by images. Every process draws the random numbers of the whole batch and uses its part of them, so the numbers do not
depend on the number of processes. Computations that couple images (contrastive objectives, batch norms) exchange data; gradients are
summed before a step. Without torchrun, the functions here have no effect.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from advml.core.errors import UserError

_total: int | None = None  # number of images of the current batch, while it is shared


def count() -> int:
    """Number of processes of this training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Number (rank) of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the first, which alone writes files, logs, and shows progress."""
    return number() == 0


def started_by_torchrun() -> bool:
    """Whether torchrun has started several processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def need_one_process(settings: Mapping[str, bool]) -> None:
    """Refuse settings that several processes do not support.

    Args:
        settings: `key = value` -> whether it is set.
    Raises:
        UserError: one is set, and torchrun has started several processes.
    """
    for setting in (name for name, used in settings.items() if used and started_by_torchrun()):
        raise UserError(f"{setting} is not supported with several processes; start without torchrun, or change this setting")


def join(device: torch.device) -> torch.device:
    """Join the process group, if torchrun has started several processes; returns the device of this one."""
    if not started_by_torchrun():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # a timeout of days, because the others wait while the first one prepares the data
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    return device


def leave() -> None:
    """Wait for the other processes, then leave the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return bool(summed(torch.tensor(float(flag), device=device)) > 0)


def need_images(total: int) -> None:
    """Raise UserError if a batch has fewer images than there are processes."""
    if total < count():
        told = f"a batch of {total} images cannot be shared by {count()} processes"
        raise UserError(f"{told}; start fewer: torchrun --nproc-per-node {total}, or choose another batch_size")


@contextlib.contextmanager
def shared(total: int) -> Iterator[slice]:
    """Context manager that shares a batch of `total` images; yields the rows that this process computes.

    Raises:
        UserError: there are more processes than images.
    """
    global _total
    if count() == 1:
        yield slice(None)
        return
    need_images(total)
    _total = total
    try:
        with _SharedBatchNorm():
            yield rows()
    finally:
        _total = None


def rows() -> slice:
    """Rows of the shared batch that this process computes; parts differ by at most one image."""
    each, more = divmod(_total, count())
    rank = dist.get_rank()
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def batch_size(own: int) -> int:
    """Size of the whole batch, of which this process has `own` images."""
    return own if _total is None else _total


def own(values: Tensor, dim: int = 0) -> Tensor:
    """Part of this process of a tensor with one entry per image of the batch."""
    return values if _total is None else values.narrow(dim, rows().start, rows().stop - rows().start)


def everyones(part: Tensor) -> Tensor:
    """Gather the entries (N, ...) of the whole batch from the parts (n, ...) of all processes; gradients are summed over processes."""
    return part if _total is None else _Everyones.apply(part)


def mean(values: Tensor) -> Tensor:
    """Mean over the batch (a scalar); for a shared batch, this process's summand: the sum over processes is the mean."""
    return values.mean() if _total is None else values.sum() / _total


def summed(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their sums over all processes."""
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = summed(torch.cat([gradient.flatten() for gradient in gradients]))  # one message
    for gradient, values in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(values.view(gradient.shape))


class _Everyones(torch.autograd.Function):
    """Gather parts of different sizes, as a sum of tensors that are zero outside of their own rows."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        ctx.rows = rows()
        whole = part.new_zeros(_total, *part.shape[1:])
        whole[ctx.rows] = part
        return summed(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient.clone(memory_format=torch.contiguous_format))[ctx.rows]


class _Summed(torch.autograd.Function):
    """Differentiable version of `summed`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return summed(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient.clone(memory_format=torch.contiguous_format))


class _SharedBatchNorm(TorchFunctionMode):
    """Context in which batch norms in train mode use mean and variance of the whole batch, without a change of layers.

    `nn.SyncBatchNorm` does the same, but only on GPUs, and replaces layers.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    features: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm like `F.batch_norm`, (x - mean) / sqrt(var + eps) * weight + bias, in train mode over the images of all processes."""
    if not training:
        return F.batch_norm(features, running_mean, running_var, weight, bias, training, momentum, eps)
    x = features.float()
    over = [0, *range(2, x.ndim)]
    size = _Summed.apply(torch.cat([x.sum(over), x.new_full((1,), x.numel() / x.shape[1])]))
    mean, number = size[:-1] / size[-1].detach(), size[-1].detach()
    centred = x - mean.view(1, -1, *[1] * (x.ndim - 2))
    variance = _Summed.apply(centred.square().sum(over)) / number
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * number / (number - 1)).to(running_var.dtype), momentum)
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shape = (1, -1, *[1] * (x.ndim - 2))
    result = centred * scale.view(shape)
    return (result if bias is None else result + bias.view(shape)).to(features.dtype)
