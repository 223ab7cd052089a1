"""Choose the images of a training, and the order of its batches.

    train split only        shuffled again in every epoch
    hybrid schemes          two streams: every batch has labelled images first, then unlabelled ones

The batches of an epoch depend only on (seed, epoch), so that a resumed training uses the same ones as an uninterrupted one.
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

FEWEST = 2  # least number of images of a stream in a batch, needed by batch norms


def check_images(scheme: Scheme, dataset: Dataset, *, batch_size: int) -> None:
    """Check that a scheme's pretraining has the images and labels that it needs, and that a batch is large enough for them.

    Raises:
        UserError: images or labels are missing, or batch_size is too small.
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
            f"{scheme.name} also needs unlabelled images, {FEWEST} or more, but there are {len(rest or ())}; set data.label_budget "
            "below 1, or data.unlabelled = true for a folder that has some"
        )
    if scheme.terms[1].reads_labels and (missing := int((rest.labels < 0).sum())):
        raise UserError(
            f"{scheme.name} needs the labels of all images, but {missing} have none; leave it out, or set data.unlabelled = false"
        )


def learnt_from(dataset: Dataset, scheme: Scheme) -> Dataset:
    """Dataset for the pretraining of a scheme, with -1 for labels that it must not use.

    For a scheme with labels, `train` has the labelled images; for one without, all images; for a hybrid, `unlabelled` is the second stream.
    """
    rest = dataset.unlabelled
    if rest is None or scheme.terms:
        return dataset if rest is None or scheme.terms[1].reads_labels else replace(dataset, unlabelled=unread(rest))
    return replace(dataset, train=dataset.train if scheme.reads_labels else unread(join(dataset.train, rest)), unlabelled=None)


def unread(split: Split) -> Split:
    """Copy of a split with all labels set to -1."""
    return Split(split.images, torch.full_like(split.labels, -1))


def join(first: Split, second: Split) -> Split:
    """Concatenate two splits; the images are put into a file if the memory is too small for them."""
    shape = (len(first) + len(second), *first.images.shape[1:])
    images = torch.from_numpy(room_for_all(shape, remedy="set data.max_train, or data.label_budget to 1"))
    return Split(torch.cat([first.images, second.images], out=images), torch.cat([first.labels, second.labels]))


class Batches(Protocol):
    """Interface of the batches of a training."""

    split: Split
    sizes: tuple[int, ...]  # numbers of images in a batch, of each stream
    count: int  # of batches in an epoch

    def __call__(self, epoch: int, generator: torch.Generator) -> Tensor: ...  # indices (count * sum(sizes),), on the generator's device


class Shuffled:
    """Batches of one split, in a new order in every epoch, without a shorter last batch."""

    def __init__(self, split: Split, *, batch_size: int) -> None:
        self.split, self.sizes, self.count = split, (min(batch_size, len(split)),), batches_of(len(split), batch_size=batch_size)

    def __call__(self, epoch: int, generator: torch.Generator) -> Tensor:
        """Indices in a random order drawn from `generator`."""
        return torch.randperm(len(self.split), generator=generator, device=generator.device)[: self.count * self.sizes[0]]


class Paired:
    """Batches of labelled, then unlabelled images, in proportion; each stream starts again, in a new order, when it ends.

    Args:
        seed: of both orders.
    """

    def __init__(self, labelled: Split, unlabelled: Split, *, batch_size: int, seed: int) -> None:
        self.lengths, self.seed = (len(labelled), len(unlabelled)), seed
        self.split, self.sizes = join(labelled, unlabelled), shares(*self.lengths, batch_size=batch_size)
        self.count = batches_of(len(self.split), batch_size=batch_size)

    def __call__(self, epoch: int, generator: torch.Generator) -> Tensor:
        """Indices of an epoch, in which batch b is batch (epoch - 1) * count + b of each stream; does not use `generator`."""
        labelled, unlabelled = (self._stream(which, first=(epoch - 1) * self.count) for which in (0, 1))
        return torch.cat([labelled, unlabelled + self.lengths[0]], dim=1).flatten().to(generator.device)

    def _stream(self, which: int, *, first: int) -> Tensor:
        """Batches (count, images) of one stream from number `first` on; each pass over its images has whole batches only."""
        length, size = self.lengths[which], self.sizes[which]
        per_pass = length // size
        passes = range(first // per_pass, (first + self.count - 1) // per_pass + 1)
        orders = (torch.randperm(length, generator=generator_for("stream", which, self.seed, number)) for number in passes)
        return torch.cat([order[: per_pass * size].view(per_pass, size) for order in orders])[first % per_pass :][: self.count]


def shares(labelled: int, unlabelled: int, *, batch_size: int) -> tuple[int, int]:
    """Numbers of labelled and unlabelled images in a batch: in proportion to their totals, but at least FEWEST (or all, if fewer)."""
    if batch_size >= labelled + unlabelled:
        return labelled, unlabelled
    first = min(max(round(batch_size * labelled / (labelled + unlabelled)), FEWEST), batch_size - FEWEST)
    return first, batch_size - first


def batches_of(images: int, *, batch_size: int) -> int:
    """Number of optimiser steps per pass over the images; a shorter last batch is left out, unless it is the only one."""
    return max(1, images // batch_size)


def batches_per_epoch(dataset: Dataset, phase: config.Phase) -> int:
    """Number of optimiser steps per epoch."""
    return batches_of(len(dataset.train) + len(dataset.unlabelled or ()), batch_size=phase.batch_size)


def batches(dataset: Dataset, phase: config.Phase, *, seed: int) -> Batches:
    """Batches of a training: two streams if the dataset has unlabelled images, else the training images."""
    if dataset.unlabelled is not None:
        return Paired(dataset.train, dataset.unlabelled, batch_size=phase.batch_size, seed=seed)
    return Shuffled(dataset.train, batch_size=phase.batch_size)
