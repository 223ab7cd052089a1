"""One loop for all schemes and regimes. It reads a task, a phase and, if there is one, an adversary.

    network, history = fit(plan, machine, checkpoint=checkpoint)
    history[2]      # {"epoch": 3, "train/loss": ..., "validation/accuracy": ..., ...}

Every random number of an epoch follows from (seed, epoch) alone, so a resumed run needs no state of a generator to end where an
uninterrupted one would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advml import config
from advml.core import ranks
from advml.core.device import HALVES, Machine, derived_seed, generator_for, out_of_memory, own_randomness
from advml.core.errors import Failure
from advml.core.messages import tell
from advml.data.batches import Feed
from advml.data.datasets import Dataset
from advml.models.memory_format import place
from advml.models.network import Network
from advml.training.adversarial_steps import COLLAPSED, WITHSTOOD, AdversarialTraining, FreePerturbation, has_collapsed
from advml.training.annealing import term_weights, view_strength
from advml.training.averaging import AVERAGES, fresh_statistics
from advml.training.checkpoint import Checkpoint, Progress, State, optimizer_state, restore_optimizer, snapshot
from advml.training.cost import GRADIENT_STEPS, counted
from advml.training.optimization import epsilon_share, learning_rate, optimizer, set_learning_rate
from advml.training.streams import batches
from advml.training.tasks import Task

Record = dict[str, float]
OnBatch = Callable[[int, int, Tensor], None]  # the loss is a number on the device: to read it makes the host wait for the step


@dataclass(frozen=True)
class Plan:
    """What one phase trains. `task=None`: there is nothing to learn, the network is taken as it is.

    Attributes:
        images: makes `dataset`: only if there is something left to do, like `task`.
    """

    network: Network
    images: Callable[[], Dataset]
    phase: config.Phase
    task: Callable[[], Task] | None  # built only if there is something left to do
    adversary: AdversarialTraining | None
    seed: int
    init: dict[str, Any] | None = None  # what its weights were taken from, for the record; None: nothing

    @cached_property
    def dataset(self) -> Dataset:
        """Learns from `train`, a hybrid also from `unlabelled`; selects on `validation`; `test` is never read."""
        return self.images()

    @property
    def epochs(self) -> int:
        """Passes over the training images."""
        return self.adversary.passes(self.phase.epochs) if self.adversary else self.phase.epochs


def fit(
    plan: Plan,
    machine: Machine,
    *,
    checkpoint: Checkpoint,
    on_epoch: Callable[[Record], None] = lambda record: None,
    on_batch: OnBatch = lambda epoch, done, loss: None,
) -> tuple[Network, list[Record]]:
    """Train as planned, going on where an interrupted process has left the checkpoint.

    Args:
        plan: what is trained.
        machine: device and precision.
        checkpoint: written after every epoch, before `on_epoch` is told of it.
        on_epoch: told the record of every epoch, those of earlier, interrupted processes first; what it raises ends the training.
        on_batch: called with (epoch, batches done, loss).
    Returns:
        The network with the selected weights, and one record per epoch.
    Raises:
        Failure: a loss, a score or a weight is not finite.
    """
    history: list[Record] = []
    if plan.task:
        epochs = train(
            plan.task(),
            plan.dataset,
            plan.phase,
            adversary=plan.adversary,
            seed=plan.seed,
            machine=machine,
            checkpoint=checkpoint,
            on_batch=on_batch,
        )
        for record in epochs:
            history.append(record)
            on_epoch(record)
    return plan.network, history


def train(
    task: Task,
    dataset: Dataset,
    phase: config.Phase,
    *,
    adversary: AdversarialTraining | None,
    seed: int,
    machine: Machine,
    checkpoint: Checkpoint,
    on_batch: OnBatch = lambda epoch, done, loss: None,
) -> Iterator[Record]:
    """Train, yielding one record per epoch (those of earlier, interrupted processes first).

    Per batch: clean_weight * mean of clean_loss + adversarial_weight * mean of adversarial_loss, the latter under an adversary; in free
    training, so many replays of the mean of loss_of_views. While a record is out, the network has the weights that were validated.

    Args:
        task: losses, objective and score of what is trained.
        dataset: as `Plan.dataset`.
        phase: epochs, optimiser, schedule, selection.
        adversary: how batches are attacked; None in standard phases.
        seed: of batches, views and random starts.
        machine: device and precision.
        checkpoint: written after every epoch; an unfinished run in it is continued.
        on_batch: called with (epoch, batches done, loss) for progress bars.
    Raises:
        Failure: a loss, a score or a weight is not finite, a batch does not fit into memory, or the training has collapsed before there was
            an average to keep.
    """
    trainer = _Trainer(task, dataset, phase, adversary, seed, machine)
    progress = checkpoint.load() or Progress()
    if progress.epoch:
        trainer.restore(progress)
    yield from progress.history
    for epoch in range(progress.epoch + 1, trainer.epochs + 1):
        if progress.history and progress.history[-1].get(COLLAPSED):
            break
        began = time.perf_counter()
        record = {"epoch": epoch} | trainer.fitting(partial(trainer.epoch, epoch, on_batch))
        progress.epoch, progress.network = epoch, snapshot(task.network)
        progress.optimizer, progress.scaler = optimizer_state(trainer.optimizer), trainer.scaler.state_dict()
        progress.carried = trainer.carried
        with trainer.averaged(epoch):
            record |= trainer.fitting(trainer.validate)
            trainer.check(record)
            trainer.guard(progress, record)
            trainer.select(progress, record)
            progress.history.append(record)
            progress.seconds += time.perf_counter() - began
            if ranks.is_first():
                checkpoint.save(progress)
            yield record
    if not progress.best:
        told = f"training collapsed before average_start = {phase.average_start:g}: there is nothing to keep"
        raise Failure(f"{told}; set average: ema or none, or attack.kind = pgd")
    task.network.load_state_dict(progress.best)


class Batch(NamedTuple):
    """Images (N, C, H, W) in [0, 1], labels and indices (N,), and the views of the images, on the device; what is drawn next."""

    images: Tensor
    labels: Tensor
    index: Tensor
    views: Tensor
    generator: torch.Generator


class _Trainer:
    """The moving parts of `train`."""

    def __init__(
        self, task: Task, dataset: Dataset, phase: config.Phase, adversary: AdversarialTraining | None, seed: int, machine: Machine
    ) -> None:
        self.task, self.phase, self.adversary, self.seed, self.machine = task, phase, adversary, seed, machine
        self.order = batches(dataset, phase, seed=seed)
        self.images, self.validation = Feed(self.order.split, machine), Feed(dataset.validation, machine)
        self.size = min(self.order.size, len(self.order.split))  # images in a batch of all processes
        for images in filter(None, (self.size, len(dataset.validation) % phase.batch_size)):  # of validation, the last batch
            ranks.need_images(images)
        place(task.network, machine.device)
        task.network.compiled, task.network.micro_batch = machine.compile, machine.micro_batch
        task.train_mode()
        self.optimizer, self.scaler = optimizer(phase, task.learners(), task.network), machine.scaler()
        self.batches, self.replays, self.epochs, self.free = self.order.count, 1, phase.epochs, None
        if adversary:
            self.replays, self.epochs = max(1, adversary.replays), adversary.passes(phase.epochs)
            self.free = FreePerturbation(adversary.training, machine) if adversary.replays else None
        self.steps = self.batches * self.epochs * self.replays
        self.average = AVERAGES[phase.average](task.network, phase, epochs=self.epochs)

    @property
    def carried(self) -> State:
        """What goes on from epoch to epoch beside weights and optimiser."""
        return self.average.state | (self.free.state if self.free else {})

    def restore(self, progress: Progress) -> None:
        self.task.network.load_state_dict(progress.network)
        restore_optimizer(self.optimizer, progress.optimizer)
        self.scaler.load_state_dict(progress.scaler)
        self.average.restore(progress.carried)
        if self.free:
            self.free.restore(progress.carried)

    def fitting(self, part: Callable[[], Record]) -> Record:
        """What a part of the work returns.

        Raises:
            Failure: a batch does not fit into memory.
        """
        try:
            return part()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        raise Failure(self._what_fits())  # here, where the error, and with it the tensors of the step, is gone

    def _what_fits(self) -> str:
        """Try ever smaller parts of a batch. The weights change: those of the last epoch are in the checkpoint."""
        network, size = self.task.network, self.phase.batch_size
        if (processes := ranks.count()) > 1:  # a trial of this one would wait for the others, which try nothing, or something else
            told = f"batch_size = {size} does not fit into the memory of {self.machine.device} in {processes} processes"
            return f"{told}; start more of them on further devices, or set a smaller batch_size in this phase"
        before, network.micro_batch = network.micro_batch, network.micro_batch or min(size, len(self.images.labels))
        while network.micro_batch > 2:
            network.micro_batch //= 2
            try:
                self.epoch(1, lambda epoch, batch, loss: _stop())
            except _Fits:
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
        else:
            return f"not even 2 images fit into the memory of {self.machine.device}; choose a smaller model.backbone or data.image_size"
        return (
            f"batch_size = {size} does not fit into the memory of {self.machine.device} at {before or size} images at a time, "
            f"and does at {network.micro_batch}: set runtime.micro_batch = {network.micro_batch}, or in this phase a smaller batch_size"
        )

    def epoch(self, epoch: int, on_batch: OnBatch) -> Record:
        """One pass over the training images, in the order of `streams`.

        Within, the host only hands work to the device: it reads nothing from there before the end.
        """
        losses = torch.zeros(self.batches, 2, device=self.machine.device)  # clean, adversarial
        self.task.train_mode()
        with counted(self.task.network) as count, self._randomness(epoch):
            for batch, drawn in enumerate(self._batches("train", epoch)):
                with ranks.shared(self.size):
                    losses[batch] = self._steps(drawn, epoch=epoch, batch=(epoch - 1) * self.batches + batch)
                on_batch(epoch, batch + 1, losses[batch].sum())
        self.average.after_epoch(epoch)
        clean, adversarial = (sum(column) / self.batches for column in ranks.summed(losses).T.tolist())
        both = self._weights(epoch)[0] > 0
        record = {"learning_rate": self.optimizer.param_groups[0]["lr"], "train/loss": clean if both else adversarial}
        record |= {"train/adversarial_loss": adversarial} if self.adversary and both else {}
        passed = ranks.summed(torch.tensor(count.images, device=self.machine.device)).item()
        return record | {GRADIENT_STEPS: passed / len(self.images.labels)}

    def _batches(self, purpose: str, epoch: int) -> Iterator[Batch]:
        """The batches of one pass, in the order, and with the views, that follow from purpose, seed and epoch."""
        generator = generator_for(purpose, self.seed, epoch, device=self.machine.device)
        order = self.order(epoch, generator)
        strength = view_strength(self.phase.view_annealing, epoch=epoch, epochs=self.epochs)
        for images, labels, index in self.images(order, size=self.size):
            with ranks.shared(self.size), self._autocast():
                views = self.task.views(images, generator=generator, strength=strength)
            yield Batch(images, labels, index, views, generator)

    def _randomness(self, epoch: int) -> AbstractContextManager[None]:
        """Layers with dropout draw from the global RNG; for other processes' images, other numbers."""
        own = [rank] if (rank := ranks.number()) else []
        return own_randomness(derived_seed("dropout", self.seed, epoch, *own), self.machine.device)

    def _weights(self, epoch: int) -> tuple[float, float]:
        """Of the clean and the attacked term; a clean term without weight is not computed."""
        if not self.adversary:
            return 1.0, 0.0
        return (0.0, 1.0) if self.free else term_weights(self.phase, epoch=epoch, epochs=self.epochs)

    def _steps(self, drawn: Batch, *, epoch: int, batch: int) -> Tensor:
        """The optimiser steps on a batch: one, or one for each replay. Returns the clean and the adversarial loss (2,), on the device."""
        total = torch.zeros(2, device=self.machine.device)
        for step in range(batch * self.replays, (batch + 1) * self.replays):
            set_learning_rate(self.optimizer, learning_rate(self.phase, step=step, steps=self.steps))
            self.optimizer.zero_grad(set_to_none=True)
            losses = torch.zeros(2, device=self.machine.device)
            for which, weight, loss in self._terms(drawn, epoch=epoch, step=step):
                self.scaler.scale(weight * loss).backward()  # each term frees its graph before the next one builds its own
                losses[which] = loss.detach()
            if step == 0:
                self._check_first(losses)
            ranks.sum_gradients(self.task.learners())
            if self.phase.gradient_clip:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.task.learners(), self.phase.gradient_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.average.after_step()
            total += losses
        return total / self.replays

    def _terms(self, batch: Batch, *, epoch: int, step: int) -> Iterator[tuple[int, float, Tensor]]:
        """(0 for clean or 1 for attacked, weight, mean loss) of one step's terms; the caller goes backwards before it asks for the next."""
        share, (clean_weight, weight) = epsilon_share(self.phase, step=step, steps=self.steps), self._weights(epoch)
        if clean_weight > 0:
            with self._autocast():
                clean = ranks.mean(self.task.clean_loss(batch.views, batch.labels, batch.index))
            yield 0, clean_weight, clean
        if self.free:
            yield from ((1, weight, loss) for loss in self.free.replay(self.task, batch.views, batch.labels, share=share))
        elif self.adversary:
            adversary, images = self.adversary.training.scaled(share), self.task.attacked(batch.images, batch.views)
            with self._autocast():
                objective = lambda: self.task.training_objective(images, batch.labels)  # noqa: E731 - built under attack, once
                attacked = adversary.attack(self.task.network, objective, images, generator=batch.generator)
                loss = ranks.mean(self.task.adversarial_loss(images, attacked, batch.labels))
            yield 1, weight, loss

    @contextmanager
    def averaged(self, epoch: int) -> Iterator[None]:
        """Within: the network has the weights to validate, with statistics of their own where the average needs them."""
        with self.average.in_place():
            if self.average.needs_statistics and epoch >= self.average.first:
                self.task.train_mode()
                with fresh_statistics(self.task.network) as batch_norms, self._randomness(epoch), torch.no_grad():
                    for batch in self._batches("statistics", epoch) if batch_norms else ():
                        for _ in self._terms(batch, epoch=epoch, step=self.steps):
                            pass
            yield

    def _autocast(self) -> AbstractContextManager[object]:
        return self.machine.autocast(training=True)

    def _attack(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The attack of validation: the whole radius in every epoch, so that epochs compare."""
        return self.adversary.validation.attack(self.task.network, lambda: self.task.objective(images, labels), images, generator=generator)

    def validate(self) -> Record:
        """Mean scores on validation; the same views and random starts in every epoch, so that epochs compare."""
        generator = generator_for("validation", self.seed, device=self.machine.device)
        clean, adversarial, withstood = [], [], []
        self.task.network.eval()
        total, size = len(self.validation.labels), self.phase.batch_size
        for batch, (images, labels) in enumerate(self.validation.in_order(size=size)):
            with ranks.shared(min(size, total - batch * size)), self._autocast():
                attacked = self._attack(images, labels, generator) if self.adversary else None
                with torch.no_grad():
                    clean.append(self.task.clean_score(images, labels, generator=generator).sum())
                    if attacked is not None:
                        adversarial.append(self.task.adversarial_score(images, attacked, labels).sum())
                        withstood += [self.task.withstood(images, attacked, labels).sum()] if self.adversary.guarded else []
        metric = self.task.metric
        scores = {f"validation/{metric}": clean, f"validation/adversarial_{metric}": adversarial, WITHSTOOD: withstood}
        return {name: sum(ranks.summed(torch.stack(sums)).tolist()) / total for name, sums in scores.items() if sums}

    def guard(self, progress: Progress, record: Record) -> None:
        """Mark the epoch, and say so, if the training has stopped withstanding the attack that it is meant to withstand."""
        if not (self.adversary and self.adversary.guarded):
            return
        shares = [one[WITHSTOOD] for one in (*progress.history, record)]
        if has_collapsed(shares, images=len(self.validation.labels)):
            record[COLLAPSED] = 1.0
            tell(
                f"warning: catastrophic overfitting in epoch {record['epoch']}: {shares[-1]:.1%} of the validation images withstand PGD, "
                f"{max(shares):.1%} did before; training ends, an earlier epoch is kept; to go further: attack.kind = pgd or free, or a "
                "smaller step_size or epsilon"
            )

    def check(self, record: Record) -> None:
        """Neither a figure of the epoch nor a weight that it ended with may be infinite or NaN: the last step comes after the last loss.

        Raises:
            Failure: the training has diverged.
        """
        broken = [key for key, value in record.items() if not math.isfinite(value)]
        broken += _not_finite(self.task.network.state_dict())
        if broken:
            precision = ", or runtime.precision: fp32" if self.machine.precision in HALVES else ""
            raise Failure(
                f"{broken[0]} is not finite in epoch {record['epoch']}; lower the learning rate (now {self.phase.learning_rate:g}) "
                f"or set gradient_clip in this phase's section of params.yaml{precision}"
            )

    def _check_first(self, losses: Tensor) -> None:
        """What is not finite before the first step does not come from the learning rate.

        Raises:
            Failure: a weight that the training starts from, a loss or a gradient is not finite.
        """
        if weights := _not_finite(dict(self.task.network.named_parameters())):  # statistics have seen the first batch by now
            remedy = "a pretraining makes them by model.backbone and model.options; a fine-tuning reads them: make its pretraining again"
            raise Failure(f"{weights[0]}, a weight that the training starts from, is not finite; {remedy}")
        # Under a scaler gradients may be infinite: a scale that is too large at first is made smaller
        named = () if self.scaler.is_enabled() else self.task.network.named_parameters()
        gradients = {f"the gradient of {key}": value.grad for key, value in named if value.grad is not None}
        if broken := _not_finite({"train/loss": losses[0], "train/adversarial_loss": losses[1]} | gradients):
            precision = "runtime.precision: fp32, then " if self.machine.precision in HALVES else ""
            raise Failure(
                f"{broken[0]} is not finite before the first step, so no learning rate can mend it; try {precision}another model.backbone, "
                "model.stem or model.options, a larger temperature, or, in a fine-tuning, another pretraining"
            )

    def select(self, progress: Progress, record: Record) -> None:
        """Keep these weights if they are the best on validation so far, by the adversarial score where there is one; ties: the later epoch.

        Under `keep: last` they are kept whatever they score. Of an epoch without an average that was asked for, or that has collapsed,
        nothing is kept.
        """
        if record["epoch"] < self.average.first or record.get(COLLAPSED):
            return
        metric, sign = self.task.metric, 1.0 if self.task.larger_is_better else -1.0
        score = sign * record.get(f"validation/adversarial_{metric}", record[f"validation/{metric}"])
        if self.phase.keep == "last" or progress.best_score is None or score >= progress.best_score:
            progress.best_score, progress.best_epoch = score, int(record["epoch"])
            progress.best = snapshot(self.task.network)


class _Fits(Exception):
    """A step has found enough memory."""


def _stop() -> None:
    raise _Fits


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [key for key, value in tensors.items() if not value.isfinite().all()]
