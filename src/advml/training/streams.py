"""Which images a training learns from, and the order in which their batches come.

    train split alone       shuffled anew in every epoch
    of a hybrid             two streams: every batch has labelled images first, then unlabelled ones

What comes in an epoch follows from (seed, epoch) alone, so that a resumed training meets the batches of an uninterrupted one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from advml import config
from advml.core.device import generator_for
from advml.core.errors import UserError
from advml.data.datasets import Dataset, Split
from advml.data.images import room_for_all
from advml.data.prepared import require_labels
from advml.recipes import Scheme

FEWEST = 2  # images of a stream in a batch, for batch norms


def check_images(scheme: Scheme, dataset: Dataset, *, batch_size: int) -> None:
    """Whether there are the images, and their labels, that the pretraining of a scheme needs, and room for them in a batch.

    Raises:
        UserError: there are not.
    """
    if scheme.reads_labels:
        require_labels(dataset, scheme.name)
    if not scheme.terms:
        return
    if batch_size < 2 * FEWEST:
        raise UserError(
            f"pretrain.{scheme.name}.batch_size = {batch_size} is too small for labelled and unlabelled images, {FEWEST} each; "
            f"set it to {2 * FEWEST} or more"
        )
    rest = dataset.unlabelled
    if rest is None or min(len(rest), len(dataset.train)) < FEWEST:
        raise UserError(
            f"{scheme.name} learns from unlabelled images too, {FEWEST} or more, and there are {len(rest or ())}; set data.label_budget "
            "below 1, or data.unlabelled = true for a folder that has some"
        )
    if scheme.terms[1].reads_labels and (missing := int((rest.labels < 0).sum())):
        raise UserError(
            f"{scheme.name} reads the labels of all images, and {missing} have none; leave it out, or set data.unlabelled = false"
        )


def learnt_from(dataset: Dataset, scheme: Scheme) -> Dataset:
    """The dataset as the pretraining of a scheme sees it: labels that it must not read are -1.

    A scheme that reads labels has the labelled images in `train`, one that reads none has all of them there, and a hybrid has its
    second stream in `unlabelled`.
    """
    rest = dataset.unlabelled
    if rest is None or scheme.terms:
        return dataset if rest is None or scheme.terms[1].reads_labels else replace(dataset, unlabelled=unread(rest))
    return replace(dataset, train=dataset.train if scheme.reads_labels else unread(join(dataset.train, rest)), unlabelled=None)


def unread(split: Split) -> Split:
    """The images without their labels."""
    return Split(split.images, torch.full_like(split.labels, -1))


def join(first: Split, second: Split) -> Split:
    """The images of both, the first ones first; in a file, like those that they are copies of, if memory is too small for them."""
    shape = (len(first) + len(second), *first.images.shape[1:])
    images = torch.from_numpy(room_for_all(shape, remedy="set data.max_train, or data.label_budget to 1"))
    return Split(torch.cat([first.images, second.images], out=images), torch.cat([first.labels, second.labels]))


class Batches(Protocol):
    """What the training loop needs to know of its images."""

    split: Split
    size: int  # images in a batch
    count: int  # of batches in an epoch

    def __call__(self, epoch: int, generator: torch.Generator) -> Tensor: ...  # indices (count * size,), on the generator's device


class Shuffled:
    """Batches of one split, in another order in every epoch; a short last batch is left for other epochs to reach."""

    def __init__(self, split: Split, *, batch_size: int) -> None:
        self.split, self.size, self.count = split, batch_size, batches_of(len(split), batch_size=batch_size)

    def __call__(self, epoch: int, generator: torch.Generator) -> Tensor:
        """A random order, drawn from `generator`."""
        return torch.randperm(len(self.split), generator=generator, device=generator.device)[: self.count * self.size]


class Paired:
    """Batches of labelled images, then unlabelled ones, by their shares; each stream begins anew, in another order, when it ends.

    Args:
        seed: of both orders.
    """

    def __init__(self, labelled: Split, unlabelled: Split, *, batch_size: int, seed: int) -> None:
        self.lengths, self.seed = (len(labelled), len(unlabelled)), seed
        self.split, self.shares = join(labelled, unlabelled), shares(*self.lengths, batch_size=batch_size)
        self.size, self.count = sum(self.shares), batches_of(len(self.split), batch_size=batch_size)

    def __call__(self, epoch: int, generator: torch.Generator) -> Tensor:
        """Batch b of an epoch is batch (epoch - 1) * count + b of each stream; nothing is drawn from `generator`."""
        labelled, unlabelled = (self._stream(which, first=(epoch - 1) * self.count) for which in (0, 1))
        return torch.cat([labelled, unlabelled + self.lengths[0]], dim=1).flatten().to(generator.device)

    def _stream(self, which: int, *, first: int) -> Tensor:
        """Batches (count, images) of one stream from number `first` on; a pass over its images is cut to whole batches."""
        length, size = self.lengths[which], self.shares[which]
        per_pass = length // size
        passes = range(first // per_pass, (first + self.count - 1) // per_pass + 1)
        orders = (torch.randperm(length, generator=generator_for("stream", which, self.seed, number)) for number in passes)
        return torch.cat([order[: per_pass * size].view(per_pass, size) for order in orders])[first % per_pass :][: self.count]


def shares(labelled: int, unlabelled: int, *, batch_size: int) -> tuple[int, int]:
    """Labelled and unlabelled images in a batch: in proportion to all there are, but FEWEST at least; all of them, if they are no more."""
    if batch_size >= labelled + unlabelled:
        return labelled, unlabelled
    first = min(max(round(batch_size * labelled / (labelled + unlabelled)), FEWEST), batch_size - FEWEST)
    return first, batch_size - first


def batches_of(images: int, *, batch_size: int) -> int:
    """Optimiser steps of one pass; a short last batch does not count, unless it is the only one."""
    return max(1, images // batch_size)


def batches_per_epoch(dataset: Dataset, phase: config.Phase) -> int:
    """Optimiser steps of an epoch."""
    return batches_of(len(dataset.train) + len(dataset.unlabelled or ()), batch_size=phase.batch_size)


def batches(dataset: Dataset, phase: config.Phase, *, seed: int) -> Batches:
    """Two streams if the dataset has unlabelled images, else its training images."""
    if dataset.unlabelled is not None:
        return Paired(dataset.train, dataset.unlabelled, batch_size=phase.batch_size, seed=seed)
    return Shuffled(dataset.train, batch_size=phase.batch_size)
