"""Batches of a split on the device: gathered there if the images fit, else on the host, ahead of time.

Prepared images are memory-mapped, so that the operating system can reclaim the memory of parts that are not in use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from advml.core import memory, ranks
from advml.core.device import Machine
from advml.data.prepared import Split

AHEAD = 4  # number of batches that are gathered on the host in advance


class Feed:
    """Source of batches of a split, whose images stay on the device as uint8 if they need at most memory.SHARE of its free memory.

    Args:
        split: images and labels on the host.
        machine: its device receives the batches.
    """

    def __init__(self, split: Split, machine: Machine) -> None:
        self.machine, self.fits = machine, split.images.nbytes <= memory.SHARE * machine.free_memory()
        self.images = split.images.to(machine.device) if self.fits else split.images
        self.labels = split.labels.to(machine.device)

    def __call__(self, order: Tensor, *, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield batches: images (n, C, H, W) in [0, 1], labels (n,) and indices (n,), all on the device.

        Args:
            order: indices (N,) on the device. If processes share batches (`core.ranks`), each gets its part of every batch.
            sizes: number of images of each stream in a batch; a shorter last batch is of one stream.
        """
        parts = []
        for batch in order.split(sum(sizes)):
            with ranks.shared(*(sizes if len(batch) == sum(sizes) else [len(batch)])):
                parts.append(ranks.own(batch))
        for index, images in zip(parts, self._gathered(parts), strict=True):
            yield self.machine.images(images), self.labels[index], index

    def in_order(self, *, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of the whole split, in order."""
        order = torch.arange(len(self.labels), device=self.machine.device)
        yield from ((images, labels) for images, labels, _ in self(order, sizes=[size]))

    def _gathered(self, indices: list[Tensor]) -> Iterator[Tensor]:
        """Yield uint8 images of each batch, on the device, or in pinned memory, for copies that do not make the host wait."""
        if self.fits:
            yield from (self.images[index] for index in indices)
            return
        parts = deque(torch.cat(indices).cpu().split([len(index) for index in indices]))
        with ThreadPoolExecutor(2) as pool:
            ahead = deque(pool.submit(self._read, parts.popleft()) for _ in range(min(AHEAD, len(parts))))
            while ahead:
                images = ahead.popleft().result()
                if parts:
                    ahead.append(pool.submit(self._read, parts.popleft()))
                yield images

    def _read(self, index: Tensor) -> Tensor:
        """uint8 images on the host, asked for before the first of them is waited for: a disk is faster with many requests at hand."""
        start, apart, size = self.images.data_ptr(), self.images.stride(0) * self.images.itemsize, self.images[0].nbytes
        for number in index.tolist():
            memory.will_read(start + number * apart, size)
        images = self.images[index]
        return images.pin_memory() if self.machine.device.type == "cuda" else images
