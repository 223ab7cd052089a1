"""One loop for all schemes and regimes. It reads a task, a phase and, if there is one, an adversary.

    network, history = fit(plan, dataset, machine, checkpoint=checkpoint)
    history[2]      # {"epoch": 3, "train/loss": ..., "validation/accuracy": ..., ...}

Every random number of an epoch
follows from (seed, epoch) alone, so a resumed run needs no RNG state to end where an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advml import config
from advml.attacks.pgd import Adversary
from advml.core import ranks
from advml.core.device import HALVES, Machine, derived_seed, generator_for, out_of_memory, own_randomness
from advml.core.errors import Failure
from advml.data.batches import Feed
from advml.data.datasets import Dataset
from advml.models.layers import depths
from advml.models.memory_format import place
from advml.models.network import Network
from advml.training.checkpoint import Checkpoint, Progress, State, optimizer_state, restore_optimizer
from advml.training.tasks import Task

# Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume.


def _cosine(progress: float) -> float:
    """1 -> 0 along half a cosine (Loshchilov & Hutter 2017, eq. 5)."""
    return (1 + math.cos(math.pi * progress)) / 2


def _onecycle(progress: float) -> float:
    """1/25 -> 1 over the first 30 %, then -> 1/250,000, both along cosines (Smith & Topin 2018, torch's defaults)."""
    start, end, peak = 1 / 25, 1 / 25 / 1e4, 0.3
    if progress < peak:
        return 1 + (start - 1) * _cosine(progress / peak)
    return end + (1 - end) * _cosine((progress - peak) / (1 - peak))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": _cosine,
    "onecycle": _onecycle,
}


def learning_rate(phase: config.Phase, *, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) out of `steps`.

    A linear warm-up over `phase.warmup` of all steps comes first; the schedule runs over the rest.
    """
    warmup = round(phase.warmup * steps)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    return phase.learning_rate * SCHEDULES[phase.schedule](progress)


def epsilon_share(phase: config.Phase, *, step: int, steps: int) -> float:
    """Share of the training radius, and of its step size, that optimiser step `step` (from 0) out of `steps` attacks with.

    It rises linearly over `phase.epsilon_warmup` of all steps and is 1 from then on.
    """
    warmup = round(phase.epsilon_warmup * steps)
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


# The optimiser of a phase, with learning rates that fall from the top of the network to the bottom if so wished.

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, **kwargs: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **kwargs),
}


def optimizer(phase: config.Phase, learners: Sequence[nn.Parameter], network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that `phase` names, over `learners`, each in exactly one group; `network` tells how deep they lie."""
    groups = layer_groups(learners, network.encoder, layer_decay=phase.layer_decay) if phase.layer_decay < 1 else [whole(learners)]
    fused = True if learners[0].is_cuda else None  # one kernel, which under fp16 also sees for itself whether to skip the step
    return OPTIMIZERS[phase.optimizer](groups, lr=phase.learning_rate, weight_decay=phase.weight_decay, fused=fused)


def whole(learners: Sequence[nn.Parameter]) -> dict[str, Any]:
    """All in one group."""
    return {"params": list(learners), "share": 1.0}


def layer_groups(learners: Sequence[nn.Parameter], encoder: nn.Module, *, layer_decay: float) -> list[dict[str, Any]]:
    """Parameters by depth, from the top: block k learns at `share` = layer_decay ** k of the rate (Bao et al. 2022, sec. 3.2).

    Heads are block 0, the encoder's last block is 1. AdamW's and SGD's weight decay is scaled with the rate, as it is part of the step.
    """
    depth = depths(encoder)
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in learners:
        groups.setdefault(depth.get(parameter, 0), []).append(parameter)
    return [{"params": groups[block], "share": layer_decay**block} for block in sorted(groups)]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Every group gets its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


# One loop for all schemes and regimes. It reads a task, a phase and, if there is one, an adversary.

Record = dict[str, float]
OnBatch = Callable[[int, int, Tensor], None]  # the loss is a number on the device: to read it makes the host wait for the step


@dataclass(frozen=True)
class Plan:
    """What one phase trains. `task=None`: there is nothing to learn, the network is taken as it is."""

    network: Network
    phase: config.Phase
    task: Callable[[], Task] | None  # built only if there is something left to do
    adversary: Adversary | None
    seed: int


def fit(
    plan: Plan,
    dataset: Dataset,
    machine: Machine,
    *,
    checkpoint: Checkpoint,
    on_epoch: Callable[[Record], None] = lambda record: None,
    on_batch: OnBatch = lambda epoch, done, loss: None,
) -> tuple[Network, list[Record]]:
    """Train as planned, going on where an interrupted process has left the checkpoint.

    Args:
        plan: what is trained.
        dataset: learns from `train`, selects on `validation`; `test` is never read.
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
            dataset,
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
    adversary: Adversary | None,
    seed: int,
    machine: Machine,
    checkpoint: Checkpoint,
    on_batch: OnBatch = lambda epoch, done, loss: None,
) -> Iterator[Record]:
    """Train, yielding one record per epoch (those of earlier, interrupted processes first).

    Per batch: mean of clean_loss + adversarial_weight * mean of adversarial_loss, the latter under an adversary.

    Args:
        task: losses, objective and score of what is trained.
        dataset: learns from `train`, selects on `validation`; `test` is never read.
        phase: epochs, optimiser, schedule, selection.
        adversary: attacks every batch; None in standard phases.
        seed: of batches, views and random starts.
        machine: device and precision.
        checkpoint: written after every epoch; an unfinished run in it is continued.
        on_batch: called with (epoch, batches done, loss) for progress bars.
    Raises:
        Failure: a loss, a score or a weight is not finite, or a batch does not fit into memory.
    """
    trainer = _Trainer(task, dataset, phase, adversary, seed, machine)
    progress = checkpoint.load() or Progress()
    if progress.epoch:
        trainer.restore(progress)
    yield from progress.history
    for epoch in range(progress.epoch + 1, phase.epochs + 1):
        record = {"epoch": epoch, **trainer.whole_epoch(epoch, on_batch)}
        trainer.check(record)
        trainer.select(progress, record)
        progress.epoch, progress.network = epoch, _copy(task.network.state_dict())
        progress.optimizer, progress.scaler = optimizer_state(trainer.optimizer), trainer.scaler.state_dict()
        progress.history.append(record)
        if ranks.is_first():
            checkpoint.save(progress)
        yield record
    task.network.load_state_dict(progress.best)


class _Trainer:
    """The moving parts of `train`."""

    def __init__(self, task: Task, dataset: Dataset, phase: config.Phase, adversary: Adversary | None, seed: int, machine: Machine) -> None:
        self.task, self.phase, self.adversary, self.seed, self.machine = task, phase, adversary, seed, machine
        self.images, self.validation = Feed(dataset.train, machine), Feed(dataset.validation, machine)
        place(task.network, machine.device)
        task.network.compiled, task.network.micro_batch = machine.compile, machine.micro_batch
        task.train_mode()
        self.optimizer, self.scaler = optimizer(phase, task.learners(), task.network), machine.scaler()
        self.batches = batches_per_epoch(dataset, phase)
        self.steps = self.batches * phase.epochs

    def restore(self, progress: Progress) -> None:
        self.task.network.load_state_dict(progress.network)
        restore_optimizer(self.optimizer, progress.optimizer)
        self.scaler.load_state_dict(progress.scaler)

    def whole_epoch(self, epoch: int, on_batch: OnBatch) -> Record:
        """Training and validation.

        Raises:
            Failure: a batch does not fit into memory.
        """
        try:
            return self.epoch(epoch, on_batch) | self.validate()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        raise Failure(self._what_fits())  # here, where the error, and with it the tensors of the step, is gone

    def _what_fits(self) -> str:
        """Try ever smaller parts of a batch. The weights change: those of the last epoch are in the checkpoint."""
        network, size = self.task.network, self.phase.batch_size
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
        """One pass over the shuffled training images; a short last batch is left for other epochs to reach.

        Within, the host only hands work to the device: it reads nothing from there before the end.
        """
        device, size = self.machine.device, self.phase.batch_size
        generator = generator_for("train", self.seed, epoch, device=device)
        order = torch.randperm(len(self.images.labels), generator=generator, device=device)[: self.batches * size]
        losses = torch.zeros(self.batches, 2, device=device)  # clean, adversarial
        self.task.train_mode()
        own = [rank] if (rank := ranks.number()) else []  # of other processes' images, dropout draws others
        with own_randomness(derived_seed("dropout", self.seed, epoch, *own), device):  # layers with dropout draw from the global RNG
            for batch, (images, labels, index) in enumerate(self.images(order, size=size)):
                with ranks.shared(min(size, len(order))):
                    losses[batch] = self._step(images, labels, index, generator, step=(epoch - 1) * self.batches + batch)
                on_batch(epoch, batch + 1, losses[batch].sum())
        clean, adversarial = (sum(column) / self.batches for column in ranks.summed(losses).T.tolist())
        record = {"learning_rate": self.optimizer.param_groups[0]["lr"], "train/loss": clean}
        return record | ({"train/adversarial_loss": adversarial} if self.adversary else {})

    def _step(self, images: Tensor, labels: Tensor, index: Tensor, generator: torch.Generator, *, step: int) -> Tensor:
        """One optimiser step; returns the clean and the adversarial loss (2,), on the device."""
        set_learning_rate(self.optimizer, learning_rate(self.phase, step=step, steps=self.steps))
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            clean = ranks.mean(self.task.clean_loss(images, labels, index, generator=generator))
        self.scaler.scale(clean).backward()  # each term frees its graph before the next one builds its own
        adversarial = torch.zeros_like(clean)
        if self.adversary:
            with self._autocast():
                adversary = self.adversary.scaled(epsilon_share(self.phase, step=step, steps=self.steps))
                objective = lambda: self.task.training_objective(images, labels)  # noqa: E731 - built under attack, once
                attacked = adversary.attack(self.task.network, objective, images, generator=generator)
                adversarial = ranks.mean(self.task.adversarial_loss(images, attacked, labels))
            self.scaler.scale(self.phase.adversarial_weight * adversarial).backward()
        losses = torch.stack([clean.detach(), adversarial.detach()])
        if step == 0:
            self._check_first(losses)
        ranks.sum_gradients(self.task.learners())
        if self.phase.gradient_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.task.learners(), self.phase.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses

    def _autocast(self) -> AbstractContextManager[object]:
        return self.machine.autocast(training=True)

    def _attack(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The attack of validation: the whole radius in every epoch, so that epochs compare."""
        return self.adversary.attack(self.task.network, lambda: self.task.objective(images, labels), images, generator=generator)

    def validate(self) -> Record:
        """Mean scores on validation; the same views and random starts in every epoch, so that epochs compare."""
        generator = generator_for("validation", self.seed, device=self.machine.device)
        clean, adversarial = [], []
        self.task.network.eval()
        total, size = len(self.validation.labels), self.phase.batch_size
        for batch, (images, labels) in enumerate(self.validation.in_order(size=size)):
            with ranks.shared(min(size, total - batch * size)), self._autocast():
                attacked = self._attack(images, labels, generator) if self.adversary else None
                with torch.no_grad():
                    clean.append(self.task.clean_score(images, labels, generator=generator).sum())
                    if attacked is not None:
                        adversarial.append(self.task.adversarial_score(images, attacked, labels).sum())
        scores = {f"validation/{self.task.metric}": clean, f"validation/adversarial_{self.task.metric}": adversarial}
        return {name: sum(ranks.summed(torch.stack(sums)).tolist()) / total for name, sums in scores.items() if sums}

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
        named = (
            () if self.scaler.is_enabled() else self.task.network.named_parameters()
        )  # a scale that is too large at first is made smaller
        gradients = {f"the gradient of {key}": value.grad for key, value in named if value.grad is not None}
        if broken := _not_finite({"train/loss": losses[0], "train/adversarial_loss": losses[1]} | gradients):
            precision = "runtime.precision: fp32, then " if self.machine.precision in HALVES else ""
            raise Failure(
                f"{broken[0]} is not finite before the first step, so no learning rate can mend it; try {precision}another model.backbone, "
                "model.stem or model.options, a larger temperature, or, in a fine-tuning, another pretraining"
            )

    def select(self, progress: Progress, record: Record) -> None:
        """Keep these weights if they are the best on validation so far, by the adversarial score where there is one; ties: the later epoch.

        Under `keep: last` they are kept whatever they score.
        """
        metric, sign = self.task.metric, 1.0 if self.task.larger_is_better else -1.0
        score = sign * record.get(f"validation/adversarial_{metric}", record[f"validation/{metric}"])
        if self.phase.keep == "last" or progress.best_score is None or score >= progress.best_score:
            progress.best_score, progress.best_epoch = score, int(record["epoch"])
            progress.best = _copy(self.task.network.state_dict())


class _Fits(Exception):
    """A step has found enough memory."""


def _stop() -> None:
    raise _Fits


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [key for key, value in tensors.items() if not value.isfinite().all()]


def batches_per_epoch(dataset: Dataset, phase: config.Phase) -> int:
    """Optimiser steps of one pass; a short last batch does not count, unless it is the only one."""
    return max(1, len(dataset.train) // phase.batch_size)


def _copy(state: State) -> State:
    return {key: value.detach().clone() for key, value in state.items()}
