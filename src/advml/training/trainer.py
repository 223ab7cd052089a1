"""Training loop for all schemes and regimes, from a task, a phase and, optionally, an adversary.

    network, history = fit(plan, machine, checkpoint=checkpoint)
    history[2]      # {"epoch": 3, "train/loss": ..., "validation/accuracy": ..., ...}

All random numbers of an epoch depend only on (seed, epoch), so a resumed training gives the result of an uninterrupted one without
stored generator states.
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
from advml.core.errors import Failure, UserError
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
OnBatch = Callable[[int, int, Tensor], None]  # the loss is on the device; reading it makes the host wait for the step


@dataclass(frozen=True)
class Plan:
    """Plan of one training phase. `task=None`: there is nothing to train, and the network is used unchanged.

    Attributes:
        images: builds `dataset`; like `task`, called only if training is not finished.
    """

    network: Network
    images: Callable[[], Dataset]
    phase: config.Phase
    task: Callable[[], Task] | None  # called only if training is not finished
    adversary: AdversarialTraining | None
    seed: int
    init: dict[str, Any] | None = None  # origin of its initial weights, for the record; None: random or pretrained

    @cached_property
    def dataset(self) -> Dataset:
        """Dataset whose `train` (for a hybrid also `unlabelled`) is for training, `validation` for selection; `test` is never read."""
        return self.images()

    @property
    def epochs(self) -> int:
        """Number of passes over the training images."""
        return self.adversary.passes(self.phase.epochs) if self.adversary else self.phase.epochs


def fit(
    plan: Plan,
    machine: Machine,
    *,
    checkpoint: Checkpoint,
    on_epoch: Callable[[Record], None] = lambda record: None,
    on_batch: OnBatch = lambda epoch, done, loss: None,
) -> tuple[Network, list[Record]]:
    """Run a plan, resuming from the checkpoint of an interrupted process.

    Args:
        plan: of the phase.
        machine: device and precision.
        checkpoint: written after every epoch, before `on_epoch` is called.
        on_epoch: called with the record of every epoch, those of interrupted processes first; its exceptions end the training.
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
    """Train, yielding one record per epoch (those of interrupted processes first).

    Loss per batch: clean_weight * mean of clean_loss + adversarial_weight * mean of adversarial_loss, the latter with an adversary; in free
    training, the mean of loss_of_views in each replay. When a record is yielded, the network has the weights that were validated.

    Args:
        task: losses, objective and score.
        dataset: as `Plan.dataset`.
        phase: epochs, optimiser, schedule, selection.
        adversary: attacks on batches; None in standard phases.
        seed: of batches, views and random starts.
        machine: device and precision.
        checkpoint: written after every epoch; an unfinished run in it is continued.
        on_batch: called with (epoch, batches done, loss) for progress bars.
    Raises:
        Failure: a loss, a score or a weight is not finite, a batch does not fit into memory, or the training has collapsed before an
            average existed.
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
        told = f"training collapsed before average_start = {phase.average_start:g}: there are no weights to keep"
        raise Failure(f"{told}; set average: ema or none, or attack.kind = pgd")
    task.network.load_state_dict(progress.best)


class Batch(NamedTuple):
    """A batch on the device: images (N, C, H, W) in [0, 1], labels and indices (N,), views, and the generator for further draws."""

    images: Tensor
    labels: Tensor
    index: Tensor
    views: Tensor
    generator: torch.Generator


class _Trainer:
    """State and steps of `train`."""

    def __init__(
        self, task: Task, dataset: Dataset, phase: config.Phase, adversary: AdversarialTraining | None, seed: int, machine: Machine
    ) -> None:
        self.task, self.phase, self.adversary, self.seed, self.machine = task, phase, adversary, seed, machine
        self.order = batches(dataset, phase, seed=seed)
        self.images, self.validation = Feed(self.order.split, machine), Feed(dataset.validation, machine)
        self.classes = len(dataset.classes)
        self.sizes = self.order.sizes
        ranks.need_images(*self.sizes)
        ranks.need_images(len(dataset.validation) % phase.batch_size or phase.batch_size, of="the last batch of validation, ")
        if machine.compile and not ranks.equal_shares(*self.sizes):
            sizes = " and ".join(map(str, self.sizes))
            told = f"runtime.compile = true needs batches that {ranks.count()} processes share equally, not {sizes} images"
            raise UserError(f"{told}; choose another batch_size, or set it to false")
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
        """State carried between epochs, besides weights and optimiser."""
        with self._shared():
            return self.average.state | (self.free.state if self.free else {})

    def restore(self, progress: Progress) -> None:
        self.task.network.load_state_dict(progress.network)
        restore_optimizer(self.optimizer, progress.optimizer)
        self.scaler.load_state_dict(progress.scaler)
        self.average.restore(progress.carried)
        if self.free:
            with self._shared():
                self.free.restore(progress.carried)

    def fitting(self, part: Callable[[], Record]) -> Record:
        """Call `part` and return its result.

        Raises:
            Failure: a batch does not fit into memory; names the largest number of images that does.
        """
        try:
            return part()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        raise Failure(self._what_fits())  # outside of the handler, so that the error and the tensors of its frames are freed

    def _what_fits(self) -> str:
        """Try smaller and smaller parts of a batch, for the error message; modifies weights, whose last epoch is in the checkpoint."""
        network, size = self.task.network, self.phase.batch_size
        if (processes := ranks.count()) > 1:  # a trial here would wait for the other processes for ever
            told = f"batch_size = {size} does not fit into the memory of {self.machine.device} in {processes} processes"
            return f"{told}; set or lower runtime.micro_batch, start more of them on further devices, or lower this phase's batch_size"
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
            f"but does at {network.micro_batch}: set runtime.micro_batch = {network.micro_batch}, or in this phase a smaller batch_size"
        )

    def epoch(self, epoch: int, on_batch: OnBatch) -> Record:
        """Train for one pass over the images, in the order of `streams`.

        The host reads nothing from the device before the end, so that it never waits for it.
        """
        losses = torch.zeros(self.batches, 2, device=self.machine.device)  # clean, adversarial
        self.task.train_mode()
        with counted(self.task.network) as count, self._randomness(epoch):
            for batch, drawn in enumerate(self._batches("train", epoch)):
                with self._shared():
                    losses[batch] = self._steps(drawn, epoch=epoch, batch=(epoch - 1) * self.batches + batch)
                on_batch(epoch, batch + 1, losses[batch].sum() * ranks.count())  # the other processes' shares are about as large
        self.average.after_epoch(epoch)
        clean, adversarial = (sum(column) / self.batches for column in ranks.summed(losses).T.tolist())
        both = self._weights(epoch)[0] > 0
        record = {"learning_rate": self.optimizer.param_groups[0]["lr"], "train/loss": clean if both else adversarial}
        record |= {"train/adversarial_loss": adversarial} if self.adversary and both else {}
        passed = ranks.summed(torch.tensor(count.images, device=self.machine.device)).item()
        return record | {GRADIENT_STEPS: passed / len(self.images.labels)}

    def _batches(self, purpose: str, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one pass; their order and views depend only on purpose, seed and epoch."""
        generator = generator_for(purpose, self.seed, epoch, device=self.machine.device)
        order = self.order(epoch, generator)
        strength = view_strength(self.phase.view_annealing, epoch=epoch, epochs=self.epochs)
        for images, labels, index in self.images(order, sizes=self.sizes):
            with self._shared(), self._autocast():
                views = self.task.views(images, generator=generator, strength=strength)
            yield Batch(images, labels, index, views, generator)

    def _shared(self) -> AbstractContextManager[None]:
        """Context that shares a training batch with the other processes."""
        return ranks.shared(*self.sizes, perturbed=self.task.perturbed)

    def _randomness(self, epoch: int) -> AbstractContextManager[None]:
        """Context that seeds the global RNG, from which dropout draws."""
        return own_randomness(derived_seed("dropout", self.seed, epoch), self.machine.device)

    def _weights(self, epoch: int) -> tuple[float, float]:
        """Weights of the clean and the adversarial term; a clean term of weight 0 is not computed."""
        if not self.adversary:
            return 1.0, 0.0
        return (0.0, 1.0) if self.free else term_weights(self.phase, epoch=epoch, epochs=self.epochs)

    def _steps(self, drawn: Batch, *, epoch: int, batch: int) -> Tensor:
        """Make the optimiser steps on a batch: one, or one per replay. Returns the clean and adversarial loss (2,), on the device."""
        total = torch.zeros(2, device=self.machine.device)
        for step in range(batch * self.replays, (batch + 1) * self.replays):
            set_learning_rate(self.optimizer, learning_rate(self.phase, step=step, steps=self.steps))
            self.optimizer.zero_grad(set_to_none=True)
            losses = torch.zeros(2, device=self.machine.device)
            for which, weight, loss in self._terms(drawn, epoch=epoch, step=step):
                self.scaler.scale(weight * loss).backward()  # per term, so that its graph is freed before the next one is built
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
        """Yield (0 for clean or 1 for adversarial, weight, mean loss) of each term; the caller computes gradients before the next one."""
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
                objective = lambda: self.task.training_objective(images, batch.labels)  # noqa: E731 - called once, under attack
                attacked = adversary.attack(self.task.network, objective, images, generator=batch.generator)
                loss = ranks.mean(self.task.adversarial_loss(images, attacked, batch.labels))
            yield 1, weight, loss

    @contextmanager
    def averaged(self, epoch: int) -> Iterator[None]:
        """Context manager: the network has the weights to validate, with re-estimated statistics if the average needs them."""
        with self.average.in_place():
            if self.average.needs_statistics and epoch >= self.average.first:
                self.task.train_mode()
                with fresh_statistics(self.task.network) as batch_norms, self._randomness(epoch), torch.no_grad():
                    for batch in self._batches("statistics", epoch) if batch_norms else ():
                        with self._shared():
                            for _ in self._terms(batch, epoch=epoch, step=self.steps):
                                pass
            yield

    def _autocast(self) -> AbstractContextManager[object]:
        return self.machine.autocast(training=True)

    def _attack(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Attack for validation, at the full epsilon in every epoch, so that epochs are comparable."""
        return self.adversary.validation.attack(self.task.network, lambda: self.task.objective(images, labels), images, generator=generator)

    def validate(self) -> Record:
        """Mean scores on validation, with the same views and random starts in every epoch, so that epochs are comparable."""
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
        """Mark the epoch's record, and print a warning, if catastrophic overfitting has occurred."""
        if not (self.adversary and self.adversary.guarded):
            return
        shares = [one[WITHSTOOD] for one in (*progress.history, record)]
        if has_collapsed(shares, images=len(self.validation.labels), classes=self.classes):
            record[COLLAPSED] = 1.0
            tell(
                f"warning: catastrophic overfitting in epoch {record['epoch']}: {shares[-1]:.1%} of the validation images withstand PGD, "
                f"{max(shares):.1%} did before; training ends, and an earlier epoch is kept; to avoid it: attack.kind = pgd or free, or a "
                "smaller step_size or epsilon"
            )

    def check(self, record: Record) -> None:
        """Check that all figures of the epoch and all final weights are finite, and that all processes have the same weights.

        The last step comes after the last loss.

        Raises:
            Failure: one is infinite or NaN: training has diverged; or processes differ.
        """
        broken = [key for key, value in record.items() if not math.isfinite(value)]
        broken += _not_finite(self.task.network.state_dict())
        if broken:
            precision = ", or runtime.precision: fp32" if self.machine.precision in HALVES else ""
            raise Failure(
                f"{broken[0]} is not finite in epoch {record['epoch']}; lower the learning rate (now {self.phase.learning_rate:g}) "
                f"or set gradient_clip in this phase's section of params.yaml{precision}"
            )
        if apart := ranks.differing(self.task.network.state_dict()):
            told = f"{apart[0]} differs between processes in epoch {record['epoch']}; its layer may compute over the images of a batch"
            raise Failure(f"{told}, which several processes do for batch norms alone; choose another one, or start one process")

    def _check_first(self, losses: Tensor) -> None:
        """Check for values that are not finite before the first step, which are not due to the learning rate.

        Raises:
            Failure: an initial weight, a loss or a gradient is not finite.
        """
        if weights := _not_finite(
            dict(self.task.network.named_parameters())
        ):  # parameters only, because statistics have seen the first batch already
            remedy = "for a pretraining, change model.backbone or model.options; for a fine-tuning, repeat its pretraining"
            raise Failure(f"the initial weight {weights[0]} is not finite; {remedy}")
        # Under a scaler gradients may be infinite at first, until the scale is small enough
        named = () if self.scaler.is_enabled() else self.task.network.named_parameters()
        gradients = {f"the gradient of {key}": value.grad for key, value in named if value.grad is not None}
        if broken := _not_finite({"train/loss": losses[0], "train/adversarial_loss": losses[1]} | gradients):
            precision = "runtime.precision: fp32, then " if self.machine.precision in HALVES else ""
            raise Failure(
                f"{broken[0]} is not finite before the first step, so the learning rate is not the cause; try {precision}another "
                "model.backbone, model.stem or model.options, a larger temperature, or, in a fine-tuning, another pretraining"
            )

    def select(self, progress: Progress, record: Record) -> None:
        """Keep these weights if they have the best validation score so far (adversarial if there is one; on a tie the later epoch).

        Under `keep: last` they are always kept. Nothing is kept of an epoch in which the requested average does not exist yet, or training
        has collapsed.
        """
        if record["epoch"] < self.average.first or record.get(COLLAPSED):
            return
        metric, sign = self.task.metric, 1.0 if self.task.larger_is_better else -1.0
        score = sign * record.get(f"validation/adversarial_{metric}", record[f"validation/{metric}"])
        if self.phase.keep == "last" or progress.best_score is None or score >= progress.best_score:
            progress.best_score, progress.best_epoch = score, int(record["epoch"])
            progress.best = snapshot(self.task.network)


class _Fits(Exception):
    """Raised when a trial step has fitted into memory."""


def _stop() -> None:
    raise _Fits


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [key for key, value in tensors.items() if not value.isfinite().all()]
