"""The device works on its own within an epoch: the host reads nothing from it and copies nothing to it, step by step.

The device is "meta", whose tensors have no values: to read one (`.item()`, `float`, `bool`, `.cpu()`, `nonzero`, indexing by a mask)
is an error, and so is what needs a type that a device may lack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from advml import config
from advml.core import ranks
from advml.core.device import Machine
from advml.data.datasets import Split
from advml.recipes import REGIMES, SCHEMES
from advml.training import trainer
from advml.training.adversarial_steps import adversarial_training
from advml.training.tasks import finetuning_task, pretraining_task

META = torch.device("meta")
SIMCLR = config.View(resized_crop=(0.2, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grey=0.2)
PHASES = {
    "SL at": ("SL", None),
    "CL at": ("CL", None),
    "SCL at": ("SCL", None),
    "CL at, free": ("CL", None),
    "Partial-AT": ("SCL", "Partial-AT"),
    "Full-AT": ("SCL", "Full-AT"),
}


class Apart(TorchDispatchMode):
    """Refuses copies between the host and the device, reads, and tensors of float64 on the device, which Apple's GPUs lack."""

    def __torch_dispatch__(self, func, types, arguments=(), keywords=None):
        result = func(*arguments, **(keywords or {}))
        given = [tensor for tensor in torch.utils._pytree.tree_leaves((arguments, keywords)) if isinstance(tensor, Tensor)]
        made = [tensor for tensor in torch.utils._pytree.tree_leaves(result) if isinstance(tensor, Tensor)]
        copies = func._schema.name in ("aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense")
        devices = {tensor.device for tensor in (*given, *made) if tensor.ndim or tensor.device == META}
        constant = func._schema.name == "aten::lift_fresh" and META in devices  # torch.tensor(..., device=...)
        if (copies and len(devices) > 1) or constant:
            raise AssertionError(f"{func} copies between host and device")
        if any(tensor.device == META and tensor.dtype == torch.float64 for tensor in made):
            raise AssertionError(f"{func} makes float64 on the device")
        return result


class MetaGenerator(torch.Generator):
    """Stands in for the device's own generator: on "meta" only shapes matter."""

    device = META


@pytest.fixture
def on_meta(monkeypatch) -> Machine:
    monkeypatch.setattr(trainer, "generator_for", lambda *parts, device: MetaGenerator())
    monkeypatch.setattr(trainer, "own_randomness", lambda *_: contextlib.nullcontext())
    for name in ("autocast", "is_autocast_enabled"):  # which know no "meta"
        known = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda kind, known=known, **options: known("cpu" if kind == "meta" else kind, **options))
    return Machine(META)


@pytest.fixture
def make_trainer(on_meta, dataset, make_network) -> Callable[[str], trainer._Trainer]:
    def make(name: str) -> trainer._Trainer:
        scheme, regime = PHASES[name]
        values = {"optimizer": "adamw", "schedule": "cosine", "batch_size": 8, "epochs": 2, "learning_rate": 0.01, "weight_decay": 0.01}
        phase = config.Phase(**values, gradient_clip=1.0, attack_kind="free" if name.endswith("free") else None)
        colour = lambda split: Split(split.images[:8].expand(-1, 3, -1, -1), split.labels[:8])  # noqa: E731
        data = replace(dataset, train=colour(dataset.train), validation=colour(dataset.validation))
        network = make_network(channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
        if regime is None:
            task = pretraining_task(network, SCHEMES[scheme], phase, spec=SIMCLR, temperature=0.2)
        else:
            task = finetuning_task(network, REGIMES[regime], phase, data.train, on_meta)
        attack = config.TrainAttack(steps=1)
        adversary = adversarial_training(attack, config.ThreatModelSection(norm="linf", epsilon=0.1), phase)
        return trainer._Trainer(task, data, phase, adversary, 0, on_meta)

    return make


def run(one: trainer._Trainer) -> list[int]:
    """The batches of the second epoch that are done before the host reads the losses, at its end."""
    done: list[int] = []
    for watched in (contextlib.nullcontext(), Apart()):  # constants are made in the first
        done.clear()
        with pytest.raises(RuntimeError, match="meta"), watched:
            one.epoch(2, lambda epoch, batch, loss: done.append(batch))
    return done


@pytest.mark.parametrize("name", PHASES)
def test_no_step_of_training_reads_from_the_device_or_copies_to_it(make_trainer, name):
    assert run(make_trainer(name)) == [1]


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_no_step_in_several_processes_reads_from_the_device_or_copies_to_it(make_trainer, monkeypatch, micro_batch):
    for name, value in {"count": 2, "number": 0}.items():
        monkeypatch.setattr(ranks, name, lambda value=value: value)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda values: None)
    one = make_trainer("SL at")
    one.task.network.encoder.drop_rate, one.task.network.micro_batch = 0.2, micro_batch
    assert run(one) == [1]


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda values: values.sum().item(),
    "float": lambda values: float(values.sum()),
    "bool": lambda values: bool((values > 0).all()),
    "cpu": lambda values: values.cpu(),
    "nonzero": lambda values: values.nonzero(),
    "mask": lambda values: values[values > 0],
    "new constant": lambda values: values * torch.tensor([1.0], device=META),
    "copy": lambda values: values + torch.ones(1).to(META),
    "double": lambda values: values.double(),
}


def test_the_test_sees_every_way_to_wait_for_the_device(make_trainer, monkeypatch):
    one = make_trainer("Partial-AT")
    assert run(one) == [1]
    loss = one.task.clean_loss
    for name, read in READS.items():
        monkeypatch.setattr(one.task, "clean_loss", lambda views, *rest, read=read: (read(views), loss(views, *rest))[1])
        with pytest.raises((RuntimeError, AssertionError)), Apart():
            one.epoch(2, lambda epoch, batch, loss, name=name: pytest.fail(f"a step passed with {name}"))
