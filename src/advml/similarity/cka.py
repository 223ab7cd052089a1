"""Linear CKA with the unbiased HSIC_1 estimator over minibatches (Nguyen et al. 2021, eq. 3; Song et al. 2012).

For a batch of n images and features X (n, p): K = X X^T with a zero diagonal,
r = K 1 / (n - 2), r -= sum(r) / (2 (n - 1)), U(K) = K - r 1^T - 1 r^T with a zero diagonal, and
n (n - 3) HSIC_1(K, L) = <U(K), U(L)>. Over batches b, as a ratio of sums:

    CKA(X, Y) = sum_b <U_b(K), U_b(L)> / sqrt( sum_b <U_b(K), U_b(K)> * sum_b <U_b(L), U_b(L)> ).

The Gram matrix is made while the layer runs, so no activation is kept and none can be overwritten. All rows of a batch
(every model, kind of input and layer) are multiplied with one another at once: blocks within a model, between clean
and adversarial inputs and between models come from the same pass. Per batch only these products are kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor, nn

from advml.similarity.layers import Layer, watching

SMALLEST_BATCH = 4  # HSIC_1 divides by n (n - 3)
CACHED = 60_000  # numbers, under 256 KiB; with a power of two the rows of a piece would fight for the same lines of the cache
WIDE = 4096  # narrower layers gain nothing from rounding, and lose: few errors do not cancel
GRAM_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Key = tuple[str, str]  # (model, kind of input), e.g. ("CL-AT-s0", "adversarial")


def centred_gram(features: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """U(X X^T) of features (n, ...): the n (n - 1) / 2 entries above the diagonal, float64.

    The mean over the batch is taken off first: the estimator is invariant to it, float32 is not. Features that do not
    differ between images beyond rounding give zeros. With `dtype` bfloat16 the products of centred features of wide layers are in it,
    where the device has instructions for that; elsewhere float32 is faster as well as more exact.
    """
    flat = _flat(features.detach())
    n, width = flat.shape
    gram, unit = _products(flat, dtype), 1.0
    typical, eps = (gram.diagonal().amax() / width).sqrt(), torch.finfo(torch.float32).eps
    if not max(1e-12, 8 * eps * flat[0].abs().amax()) < typical < 1e12:  # a layer that is dead, tiny or huge
        size, spread = flat.abs().amax().float(), (flat.float() - flat.float().mean(0)).abs().amax()
        if spread <= 4 * eps * size:  # what is left is rounding
            return torch.zeros(n * (n - 1) // 2, dtype=torch.float64, device=flat.device)
        gram, unit = _products(flat.float() / spread, dtype), spread.double() ** 2
    return u_centred(gram.double()) * unit


def u_centred(gram: Tensor) -> Tensor:
    """U(K) of a kernel matrix (n, n), whose diagonal is overwritten: the n (n - 1) / 2 entries above the diagonal."""
    n = len(gram)
    gram.fill_diagonal_(0)
    row = gram.sum(1) / (n - 2)
    row -= row.sum() / (2 * (n - 1))
    centred_twice = gram - row[:, None] - row[None, :]
    return centred_twice[tuple(torch.triu_indices(n, n, 1, device=gram.device))]


def _flat(features: Tensor) -> Tensor:
    """(n, p), in whatever order features lie in memory: with channels last, (n, C, H, W) need not be copied."""
    order = sorted(range(1, features.ndim), key=lambda dimension: -features.stride(dimension))
    return features.permute(0, *order).reshape(len(features), -1)


def _products(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """X X^T of features (n, p) less their mean, float32; on a processor in pieces that fit in its cache, so nothing large is made."""
    n, width = flat.shape
    rounded = dtype is not torch.float32 and width >= WIDE and _multiplies_bfloat16(flat.device)
    gram = torch.zeros(n, n, device=flat.device)
    shares = torch.full((1, n), 1 / n, device=flat.device)  # the mean as a product: one sweep over rows that lie far apart
    for part in flat.split(width if flat.is_cuda else max(1, CACHED // n), dim=1):
        centred = part.float() - shares @ part.float()
        if rounded:
            centred = centred.to(dtype)
            gram += centred @ centred.T
        else:
            gram.addmm_(centred, centred.T)
    return gram


@functools.cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it."""
    return device.type != "cpu" or any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


@dataclass(frozen=True, eq=False)
class Similarity:
    """Products of rows with one another, batch by batch.

    Attributes:
        rows: the layers of each (model, kind of input).
        products: for pairs of keys, <U_b(K), U_b(L)> = n (n - 3) HSIC_1 of every layer of the first with every one of
            the second, float64, (batches, L1, L2).
        norms: <U_b(K), U_b(K)> of each key's layers, (batches, L).
        sizes: images per batch.
        left_out: images of batches too small for the estimator.
        ends: products of one layer of every key with those of all, in the order of `norms`, (batches, K, K); None if none was asked for.
    """

    rows: Mapping[Key, tuple[Layer, ...]]
    products: Mapping[tuple[Key, Key], np.ndarray]
    norms: Mapping[Key, np.ndarray]
    sizes: tuple[int, ...]
    left_out: int = 0
    ends: np.ndarray | None = None

    def cka(self, first: Key, second: Key, *, weights: np.ndarray | None = None) -> np.ndarray:
        """CKA between the layers of `first` and of `second`, (L1, L2); or (S, L1, L2) for S weightings (S, batches).

        Never clamped: an unbiased estimate of nothing is negative half of the time. A dead layer is NaN.

        Raises:
            KeyError: the pair was not measured.
        """
        chosen = np.ones((1, len(self.sizes))) if weights is None else weights
        if (first, second) in self.products:
            cross = np.tensordot(chosen, self.products[first, second], axes=1)
        else:
            cross = np.tensordot(chosen, self.products[second, first], axes=1).swapaxes(1, 2)
        rows, columns = chosen @ self.norms[first], chosen @ self.norms[second]
        with np.errstate(invalid="ignore", divide="ignore"):
            result = cross / np.sqrt(rows[:, :, None] * columns[:, None, :])
        return result[0] if weights is None else result

    def matrix(self, first: Key, second: Key) -> np.ndarray:
        """(L1, L2), as `cka`."""
        return self.cka(first, second)

    def without_each(self, first: Key, second: Key, *, size: int = 100) -> Iterator[np.ndarray]:
        """CKA without each batch, (B, L1, L2), in parts: a matrix for each would not fit for many layers and batches."""
        weights = 1 - np.eye(len(self.sizes))
        for start in range(0, len(weights), size):
            yield self.cka(first, second, weights=weights[start : start + size])

    def alive(self, first: Key, second: Key) -> tuple[np.ndarray, np.ndarray]:
        """Which layers tell images apart, (L1,) and (L2,) bool."""
        return self.norms[first].sum(0) > 0, self.norms[second].sum(0) > 0

    def ends_cka(self) -> np.ndarray:
        """CKA between the ends, (K, K)."""
        total = self.ends.sum(0)
        sizes = np.sqrt(np.diagonal(total))
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / (sizes[:, None] * sizes)

    def merged(self, other: Similarity) -> Similarity:
        """Both shards as one pass over all their batches."""
        if _names(self) != _names(other):
            raise ValueError("shards of different rows cannot be merged")
        return replace(
            self,
            products={pair: np.concatenate([product, other.products[pair]]) for pair, product in self.products.items()},
            norms={key: np.concatenate([norm, other.norms[key]]) for key, norm in self.norms.items()},
            sizes=self.sizes + other.sizes,
            left_out=self.left_out + other.left_out,
            ends=None if self.ends is None else np.concatenate([self.ends, other.ends]),
        )


def _names(similarity: Similarity) -> dict[Key, list[str]]:
    return {key: [layer.name for layer in layers] for key, layers in similarity.rows.items()}


def measure(
    networks: Mapping[str, nn.Module],
    rows: Mapping[str, Sequence[Layer]],
    batches: Iterable[Mapping[Key, Tensor]],
    *,
    pairs: Sequence[tuple[Key, Key]] | None = None,
    gram: str = "float32",
    ends: Mapping[str, int] | None = None,
) -> Similarity:
    """One pass over paired batches.

    Args:
        networks: by name.
        rows: the layers to record of each.
        batches: for each batch the images (n, C, H, W) of every (model, kind); the same n images behind every key, in one order.
        pairs: the blocks to keep; None: all.
        gram: a key of GRAM_TYPES; bfloat16, with errors below 5e-4, is faster where the device multiplies in it.
        ends: of each network one row, which all keys are compared in, whatever `pairs` says.
    Raises:
        ValueError: batches with different keys, or of different sizes under one another's keys, or none large enough.
    """
    keys: tuple[Key, ...] = ()
    products: list[dict[tuple[Key, Key], np.ndarray]] = []
    norms: list[dict[Key, np.ndarray]] = []
    ending: list[np.ndarray] = []
    sizes, left_out = [], 0
    for batch in batches:
        keys = keys or tuple(batch)
        counts = {len(images) for images in batch.values()}
        if tuple(batch) != keys or len(counts) != 1:
            raise ValueError("every batch needs the same images under the same (model, kind of input) keys")
        (n,) = counts
        if n < SMALLEST_BATCH:
            left_out += n
            continue
        grams = {key: _grams(networks[key[0]], rows[key[0]], images, GRAM_TYPES[gram]) for key, images in batch.items()}
        pairs = list(combinations_with_replacement(keys, 2)) if pairs is None else pairs
        products.append({(first, second): 2 * (grams[first] @ grams[second].T).cpu().numpy() for first, second in pairs})
        norms.append({key: (2 * own.square().sum(1)).cpu().numpy() for key, own in grams.items()})
        if ends is not None:
            last = torch.stack([own[ends[model]] for (model, _), own in grams.items()])
            ending.append(2 * (last @ last.T).cpu().numpy())
        sizes.append(n)
    if not sizes:
        raise ValueError(f"no batch has {SMALLEST_BATCH} or more images")
    return Similarity(
        rows={key: tuple(rows[key[0]]) for key in keys},
        products={pair: np.stack([product[pair] for product in products]) for pair in pairs},
        norms={key: np.stack([norm[key] for norm in norms]) for key in keys},
        sizes=tuple(sizes),
        left_out=left_out,
        ends=np.stack(ending) if ending else None,
    )


def _grams(network: nn.Module, rows: Sequence[Layer], images: Tensor, dtype: torch.dtype) -> Tensor:
    """The centred Gram matrix of every row, (len(rows), n (n - 1) / 2)."""
    n = len(images)
    # A row that this batch does not reach stays NaN: memory as found would pass for a measurement.
    grams = torch.full((len(rows), n * (n - 1) // 2), math.nan, dtype=torch.float64, device=images.device)

    def see(number: int, output: Tensor) -> None:
        grams[number] = centred_gram(output, dtype=dtype)

    with watching(network, rows, see) as run:
        run(images)
    return grams
