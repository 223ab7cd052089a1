"""Linear CKA with the unbiased HSIC_1 estimator over minibatches (Nguyen et al. 2021, eq. 3; Song et al. 2012).

For a batch of n images and features X (n, p): K = X X^T with a zero diagonal,
r = K 1 / (n - 2), r -= sum(r) / (2 (n - 1)), U(K) = K - r 1^T - 1 r^T with a zero diagonal, and
n (n - 3) HSIC_1(K, L) = <U(K), U(L)>. Over batches b, as a ratio of sums:

    CKA(X, Y) = sum_b <U_b(K), U_b(L)> / sqrt( sum_b <U_b(K), U_b(K)> * sum_b <U_b(L), U_b(L)> ).

The Gram matrix is computed while the layer runs, so that no activation is kept or overwritten. All rows of a batch (every model, kind of
input and layer) are multiplied with one another at once: blocks within a model, between clean and adversarial inputs and between models
come from the same pass. Only these products are kept per batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor, nn

from advml.core.device import double
from advml.similarity.layers import Layer, watching

SMALLEST_BATCH = 4  # HSIC_1 divides by n (n - 3)
CACHED = 60_000  # numbers per piece, under 256 KiB; not a power of two, which would cause conflicts between rows in the cache
WIDE = 4096  # least width for bfloat16: narrower layers are not faster with it, and few rounding errors do not cancel
GRAM_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Key = tuple[str, str]  # (model, kind of input), e.g. ("CL-AT-s0", "adversarial")


def centred_gram(features: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """U(X X^T) of features (n, ...): the n (n - 1) / 2 entries above the diagonal, float64; on the host where the device has no float64.

    The mean over the batch is subtracted first; the estimator is invariant to it, but float32 rounding is not. Features that differ between
    images only by rounding give zeros. With `dtype` bfloat16, products of wide layers' features use it if the device has instructions for
    it; otherwise float32 is faster and more accurate.
    """
    flat = _flat(features.detach())
    n, width = flat.shape
    gram, unit = _products(flat, dtype), 1.0
    typical, eps = (gram.diagonal().amax() / width).sqrt(), torch.finfo(torch.float32).eps
    if not max(1e-12, 8 * eps * flat[0].abs().amax()) < typical < 1e12:  # the layer is constant, or its values tiny or huge
        size, spread = flat.abs().amax().float(), (flat.float() - flat.float().mean(0)).abs().amax()
        if spread <= 4 * eps * size:  # the differences are rounding errors
            return double(torch.zeros(n * (n - 1) // 2, device=flat.device))
        gram, unit = _products(flat.float() / spread, dtype), double(spread) ** 2
    return u_centred(double(gram)) * unit


def u_centred(gram: Tensor) -> Tensor:
    """U(K) of a kernel matrix (n, n), whose diagonal is overwritten: the n (n - 1) / 2 entries above the diagonal."""
    n = len(gram)
    gram.fill_diagonal_(0)
    row = gram.sum(1) / (n - 2)
    row -= row.sum() / (2 * (n - 1))
    centred_twice = gram - row[:, None] - row[None, :]
    return centred_twice[tuple(torch.triu_indices(n, n, 1, device=gram.device))]


def _flat(features: Tensor) -> Tensor:
    """Flatten features to (n, p) in their order in memory, so that channels-last tensors need not be copied."""
    order = sorted(range(1, features.ndim), key=lambda dimension: -features.stride(dimension))
    return features.permute(0, *order).reshape(len(features), -1)


def _products(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """X X^T of centred features (n, p), float32; on a CPU in pieces that fit into its cache, without large temporaries."""
    n, width = flat.shape
    rounded = dtype is not torch.float32 and width >= WIDE and _multiplies_bfloat16(flat.device)
    gram = torch.zeros(n, n, device=flat.device)
    shares = torch.full((1, n), 1 / n, device=flat.device)  # the mean as a product, which reads memory only once
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
    """Whether the device has instructions for products in bfloat16."""
    return device.type != "cpu" or any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


@dataclass(frozen=True, eq=False)
class Similarity:
    """Products of Gram matrices of layers, per batch, from which CKA is computed.

    Attributes:
        rows: the layers of each (model, kind of input).
        products: for pairs of keys, <U_b(K), U_b(L)> = n (n - 3) HSIC_1 of every layer of the first with every one of
            the second, float64, (batches, L1, L2).
        norms: <U_b(K), U_b(K)> of each key's layers, (batches, L).
        sizes: images per batch.
        left_out: number of images in batches too small for the estimator.
        ends: products between one layer of each of the K keys, in the order of `norms`, (batches, K, K); None if not requested.
    """

    rows: Mapping[Key, tuple[Layer, ...]]
    products: Mapping[tuple[Key, Key], np.ndarray]
    norms: Mapping[Key, np.ndarray]
    sizes: tuple[int, ...]
    left_out: int = 0
    ends: np.ndarray | None = None

    def cka(self, first: Key, second: Key, *, weights: np.ndarray | None = None) -> np.ndarray:
        """CKA between the layers of `first` and of `second`, (L1, L2); or (S, L1, L2) for S weightings (S, batches).

        Not clamped: for unrelated layers, an unbiased estimate is negative half of the time. NaN for dead layers.

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
        """CKA (L1, L2); the same as `cka`, for the interface shared with `Tables`."""
        return self.cka(first, second)

    def without_each(self, first: Key, second: Key, *, size: int = 100) -> Iterator[np.ndarray]:
        """Yield CKA without each batch (B, L1, L2), in parts, because all of it may not fit into memory."""
        weights = 1 - np.eye(len(self.sizes))
        for start in range(0, len(weights), size):
            yield self.cka(first, second, weights=weights[start : start + size])

    def alive(self, first: Key, second: Key) -> tuple[np.ndarray, np.ndarray]:
        """Masks (L1,) and (L2,) of living layers, which are not constant over images."""
        return self.norms[first].sum(0) > 0, self.norms[second].sum(0) > 0

    def ends_cka(self) -> np.ndarray:
        """CKA (K, K) between the final layers of all keys."""
        total = self.ends.sum(0)
        sizes = np.sqrt(np.diagonal(total))
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / (sizes[:, None] * sizes)


def measure(
    networks: Mapping[str, nn.Module],
    rows: Mapping[str, Sequence[Layer]],
    batches: Iterable[Mapping[Key, Tensor]],
    *,
    pairs: Sequence[tuple[Key, Key]] | None = None,
    gram: str = "float32",
    ends: Mapping[str, int] | None = None,
) -> Similarity:
    """Measure the similarity of layers in one pass over paired batches.

    Args:
        networks: by name.
        rows: layers to record, by network.
        batches: for each batch, the images (n, C, H, W) of every (model, kind): versions of the same n images in one order.
        pairs: pairs of keys to keep; None: all.
        gram: a key of GRAM_TYPES; bfloat16, with errors below 5e-4, is faster if the device supports it.
        ends: index of one row per network, in which all keys are compared, regardless of `pairs`.
    Raises:
        ValueError: keys differ between batches, sizes differ between keys, or no batch is large enough.
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
    """Centred Gram matrix of every row, (len(rows), n (n - 1) / 2)."""
    n = len(images)
    # NaN for rows that this batch does not reach; uninitialised memory would look like a measurement.
    grams = double(torch.full((len(rows), n * (n - 1) // 2), math.nan, device=images.device))

    def see(number: int, output: Tensor) -> None:
        grams[number] = centred_gram(output, dtype=dtype)

    with watching(network, rows, see) as run:
        run(images)
    return grams
