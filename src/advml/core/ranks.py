"""Train one model with several processes, started by `start` or torchrun; each has a device, and processes a part of every batch.

Of P processes, process r computes the images r, r + P, r + 2 P, ... of every batch. Every process draws the random numbers of the whole
batch and uses its part of them, so the numbers do not depend on the number of processes. Computations that couple images (contrastive
objectives, batch norms) exchange data; gradients are summed before a step. Without torchrun, the functions here have no effect.

A tensor of a batch has blocks of one row per image: one block, one for each view, or, in a hybrid's batch, blocks of each stream.

Within `shared`, layers that couple images or draw random numbers (batch norms, dropout, stochastic depth) do so for all processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from advml.core.errors import Failure, UserError
from advml.core.processes import PARENT

_streams: tuple[int, ...] = ()  # numbers of images of the current batch in each stream, while it is shared
_perturbed: tuple[int, ...] = ()  # sizes of the blocks of its tensors of perturbed images
_pass: Pass | None = None  # rows that the encoder computes now


class Pass(NamedTuple):
    """Rows of a batch that pass the encoder at once: their number over all processes, and those of this process, on its device."""

    size: int
    own: Tensor


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


def start(processes: int) -> NoReturn:
    """Run this command in several processes of this machine by torchrun, without its report of errors, and end with their exit code.

    Raises:
        Failure: a process was killed.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[PARENT] = str(os.getpid())  # so that no process outlives a killed launcher
    logging.disable()  # torchrun reports every signal and error at length
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    try:
        with tempfile.TemporaryDirectory() as folder:  # torchrun would leave its own
            run.run(run.parse_args(["--standalone", f"--nproc-per-node={processes}", f"--log-dir={folder}", "-m", "advml", *sys.argv[1:]]))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        told = f"process {rank} of {processes} was killed by signal {-failure.exitcode}"
        raise Failure(f"{told}; the same command continues from the last finished epoch") from None
    sys.exit(0)


def join(device: torch.device) -> torch.device:
    """Join the process group, if torchrun has started several processes; returns the device of this one.

    Raises:
        UserError: `torch.distributed` has no exchange for such devices; WORLD_SIZE is set, but not by torchrun.
    """
    if not started_by_torchrun():
        return device
    if device.type == "mps":
        raise UserError("several processes cannot share runtime.device = mps; set it to cpu, or start one process")
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        told = f"WORLD_SIZE = {os.environ['WORLD_SIZE']} is set in the environment without {', '.join(missing)}"
        raise UserError(f"{told}, so not by torchrun; unset it, or start several processes with --processes")
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # a timeout of days, because the others wait while the first one prepares the data
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=7), device_id=device if on_gpu else None)
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


def need_images(*streams: int, of: str = "a batch, ") -> None:
    """Raise UserError if a stream has fewer images in a batch than there are processes.

    Args:
        of: name of the batch, for the message.
    """
    if min(streams) < count():
        told = f"{of}{' and '.join(map(str, streams))} images, cannot be shared by {count()} processes"
        raise UserError(f"{told}; start {min(streams)} or fewer, or choose another batch_size")


@contextlib.contextmanager
def shared(*streams: int, perturbed: Sequence[int] = ()) -> Iterator[None]:
    """Context manager that shares a batch among all processes; inside another one, it shares one stream of that batch.

    Args:
        streams: number of images of each stream in the batch.
        perturbed: numbers of perturbed rows per image of each stream; can be left out for one stream.
    Raises:
        UserError: a stream has fewer images than there are processes.
    """
    global _streams, _perturbed
    if count() == 1:
        yield
        return
    need_images(*streams)
    outer = _streams, _perturbed
    _streams = streams
    _perturbed = tuple(size for size, rows in zip(streams, perturbed, strict=True) for _ in range(rows)) if perturbed else ()
    try:
        with contextlib.nullcontext() if outer[0] else _SharedLayers():
            yield
    finally:
        _streams, _perturbed = outer


@contextlib.contextmanager
def computing(rows: Pass, *, again: bool = False) -> Iterator[None]:
    """Context manager around a pass of the encoder.

    Args:
        again: the pass is repeated inside a backward pass, where a `TorchFunctionMode` is suspended.
    """
    global _pass
    outer, _pass = _pass, rows
    try:
        with _SharedLayers() if again and _streams else contextlib.nullcontext():
            yield
    finally:
        _pass = outer


def equal_shares(*sizes: int) -> bool:
    """Whether all processes have the same number of images of each size, and of the current pass of the encoder.

    Only then do they compile it alike, and exchange statistics of independent batch norms in the same order.
    """
    return all(size % count() == 0 for size in (*sizes, *_streams, *([_pass.size] if _streams and _pass else [])))


def part(size: int) -> int:
    """Number of images of this process, of `size` images."""
    return len(range(number(), size, count()))


def batch_size(own: int) -> int:
    """Number of rows of all processes in a tensor of the batch, of which this process has `own`."""
    return sum(_blocks(own, part)) if _streams else own


def own(values: Tensor, dim: int = 0) -> Tensor:
    """Part of this process of a tensor with rows (along `dim`) for the whole batch."""
    return values.index_select(dim, _rows(_blocks(values.shape[dim], int), values.device)) if _streams else values


def everyones(rows: Tensor) -> Tensor:
    """Gather the rows (N, ...) of the whole batch from the parts (n, ...) of all processes; gradients are summed over processes."""
    return _Everyones.apply(rows, _blocks(len(rows), part)) if _streams else rows


def passes(own: int, parts: int, device: torch.device) -> list[Pass]:
    """Split the rows of all processes into parts of nearly equal size.

    Args:
        own: number of rows of this process.
    """
    return _passes(_blocks(own, part), number(), count(), parts, device) if _streams else _passes((own,), 0, 1, parts, device)


@cache  # because a copy to a device makes the host wait
def _passes(blocks: tuple[int, ...], rank: int, processes: int, parts: int, device: torch.device) -> list[Pass]:
    mine = torch.zeros(sum(blocks), dtype=torch.bool)
    for size, end in zip(blocks, accumulate(blocks), strict=True):
        mine[end - size + rank : end : processes] = True
    return [Pass(len(rows), rows.nonzero()[:, 0].to(device)) for rows in mine.tensor_split(parts)]


def mean(values: Tensor) -> Tensor:
    """Mean over the batch (a scalar); for a shared batch, this process's summand: the sum over processes is the mean."""
    return values.sum() / sum(_streams) if _streams else values.mean()


def _blocks(rows: int, count_in: Callable[[int], int]) -> tuple[int, ...]:
    """Sizes, over all processes, of the blocks of a tensor with `rows` rows, `count_in(size)` in a block."""
    if rows == sum(map(count_in, _perturbed)):
        return _perturbed
    views, rest = divmod(rows, sum(map(count_in, _streams)))
    assert not rest and (views == 1 or len(_streams) == 1), f"{rows} rows are not those of a batch of {_streams} images"
    return views * _streams


def _rows(blocks: Sequence[int], device: torch.device) -> Tensor:
    """Rows of this process among those of blocks."""
    ends = zip(blocks, accumulate(blocks), strict=True)
    return torch.cat([torch.arange(end - size + number(), end, count(), device=device) for size, end in ends])


def summed(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def differing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors of which processes have different values, by their norms, beyond rounding."""
    if count() == 1:
        return []
    norms = torch.stack([values.float().norm() for values in tensors.values()])
    extremes = torch.stack([norms, -norms])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, least = extremes[0], -extremes[1]
    apart = (largest - least > 1e-4 * largest).tolist()
    return [name for name, differs in zip(tensors, apart, strict=True) if differs]


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
    def forward(ctx: Any, part: Tensor, blocks: Sequence[int]) -> Tensor:
        ctx.rows = _rows(blocks, part.device)
        return summed(part.new_zeros(sum(blocks), *part.shape[1:]).index_copy_(0, ctx.rows, part))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed(gradient.clone(memory_format=torch.contiguous_format)).index_select(0, ctx.rows), None


class _Summed(torch.autograd.Function):
    """Differentiable version of `summed`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return summed(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient.clone(memory_format=torch.contiguous_format))


class _SharedLayers(TorchFunctionMode):
    """Context in which layers compute and draw for the images of all processes, without a change of the layers.

    `nn.SyncBatchNorm` does the same for batch norms, but only on GPUs, and replaces layers.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _OF_ALL_IMAGES.get(func, func)(*args, **(kwargs or {}))


def _drawn(draw: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Rows of this process of what is drawn for all processes; a tensor without rows of images is drawn alike in all of them."""
    if not (_pass and like.ndim) or len(like) % len(_pass.own):
        return draw(like.clone())
    per_image = len(like) // len(_pass.own)
    shape, order = (_pass.size * per_image, *like.shape[1:]), like.dim_order()  # random numbers follow the order in memory
    whole = torch.empty_permuted(shape, order, dtype=like.dtype, device=like.device).fill_(1)
    return draw(whole).unflatten(0, (_pass.size, per_image))[_pass.own].flatten(0, 1)


def _filled(fill: Callable[..., Tensor], values: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """In-place functions such as `Tensor.bernoulli_`, which stochastic depth uses; those with a generator draw as they are."""
    if options.get("generator") or any(isinstance(value, Tensor) for value in (*arguments, *options.values())):
        return fill(values, *arguments, **options)
    return values.copy_(_drawn(lambda rows: fill(rows, *arguments, **options), values))


def _made(make: Callable[..., Tensor], *size: Any, **options: Any) -> Tensor:
    """`torch.rand` and `torch.randn`, from which patches to drop are chosen; with a generator as they are."""
    if options.get("generator"):
        return make(*size, **options)
    return _drawn(lambda rows: make(rows.shape, **options), torch.empty(*size, **options))


def _dropout(of: Callable[..., Tensor], features: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout `of` features."""
    if not training or not 0 < p < 1:
        return of(features, p, training)
    kept = _drawn(lambda rows: of(rows, p), torch.ones_like(features)).bool()  # without its factor, which bfloat16 would round
    return features * kept * (1 / (1 - p))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention`; with dropout, its weights are computed as the attention to an identity."""
    attend = partial(F.scaled_dot_product_attention, query, key, attn_mask=attn_mask, is_causal=is_causal, **options)
    if not dropout_p:
        return attend(value)
    identity = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device).expand(*key.shape[:-1], -1)
    return _dropout(F.dropout, attend(identity).contiguous(), dropout_p) @ value


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


# Functions -> what `_SharedLayers` computes instead of them.
_OF_ALL_IMAGES: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.scaled_dot_product_attention: _attention,
    **{of: partial(_dropout, of) for of in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)},
    **{fill: partial(_filled, fill) for fill in (Tensor.bernoulli_, Tensor.normal_, Tensor.uniform_)},
    **{make: partial(_made, make) for make in (torch.rand, torch.randn)},
}
