"""Batches larger than memory: in parts on request, and one line with the size that fits where there is not enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from advml import config
from advml.attacks.pgd import Adversary
from advml.core import ranks
from advml.core.device import Machine
from advml.core.errors import Failure
from advml.data.datasets import Dataset, Split
from advml.models.network import Network
from advml.recipes import SCHEMES
from advml.training.adversarial_steps import adversarial_training
from advml.training.checkpoint import Checkpoint
from advml.training.tasks import Classification, Task, pretraining_task
from advml.training.trainer import train

CPU = Machine(torch.device("cpu"))
PHASE = config.Phase(epochs=2, batch_size=16, optimizer="sgd", learning_rate=0.05, weight_decay=0.0, schedule="constant")
ADVERSARY = adversarial_training(config.TrainAttack(steps=2), config.ThreatModelSection(norm="linf", epsilon=0.1), PHASE)


@pytest.fixture
def small(dataset) -> Dataset:
    """Two batches of 16 to learn from, one of 8 to select on."""
    first = lambda split, n: Split(split.images[:n], split.labels[:n])  # noqa: E731
    return replace(dataset, train=first(dataset.train, 32), validation=first(dataset.validation, 8))


@pytest.fixture
def learn(tmp_path, small) -> Callable[..., tuple[dict[str, torch.Tensor], list[dict[str, float]]]]:
    """Weights and history of a task's training on a machine."""
    folders = (tmp_path / str(number) for number in range(100))

    def run(task: Task, machine: Machine = CPU, epochs: int = 2, folder: Any = None) -> tuple[dict[str, torch.Tensor], list[Any]]:
        phase = PHASE.model_copy(update={"epochs": epochs})
        checkpoint = Checkpoint(folder or next(folders), "same")
        history = list(train(task, small, phase, adversary=ADVERSARY, seed=3, machine=machine, checkpoint=checkpoint))
        return task.network.state_dict(), history

    return run


def contrastive(network: Network) -> Task:
    return pretraining_task(network, SCHEMES["SCL"], PHASE, spec=config.View(shift=0.2), temperature=0.2)


def test_a_training_in_parts_ends_with_the_weights_of_whole_batches(learn, make_network):
    """With statistics that stay: those of a part are not those of its batch."""
    whole, parts = (learn(Classification(make_network(), frozen_statistics=True), replace(CPU, micro_batch=size)) for size in (None, 5))
    assert [list(record.values()) for record in parts[1]] == [pytest.approx(list(record.values()), rel=1e-4) for record in whole[1]]
    for name, value in whole[0].items():
        torch.testing.assert_close(parts[0][name], value, rtol=1e-3, atol=1e-5, msg=name)


def full(network: Network, *, most: int) -> Network:
    """A network whose encoder finds no memory for more images than `most`."""

    def check(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nof several lines")

    network.encoder.register_forward_pre_hook(check)
    return network


def test_too_large_a_batch_ends_in_one_line_with_the_size_that_fits(learn, make_network, tmp_path):
    with pytest.raises(Failure) as failure:
        learn(contrastive(full(make_network(), most=9)))
    message = str(failure.value)
    assert "batch_size = 16" in message and "runtime.micro_batch = 8" in message and "\n" not in message
    learn(contrastive(full(make_network(), most=9)), replace(CPU, micro_batch=8))  # it does


def test_what_fits_is_tried_without_harm_to_the_state_on_disk(learn, make_network, tmp_path):
    learn(contrastive(make_network()), epochs=2, folder=tmp_path / "state")
    before = (tmp_path / "state" / "state.safetensors").read_bytes()
    with pytest.raises(Failure, match=r"runtime\.micro_batch = 4"):
        learn(contrastive(full(make_network(), most=5)), epochs=3, folder=tmp_path / "state")
    assert (tmp_path / "state" / "state.safetensors").read_bytes() == before


def test_where_nothing_fits_no_size_is_named(learn, make_network):
    with pytest.raises(Failure, match="not even 2 images"):
        learn(contrastive(full(make_network(), most=0)))


def test_nothing_is_tried_in_one_of_several_processes(learn, make_network, monkeypatch):
    """The others would wait for it."""
    network = make_network()

    def check(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        monkeypatch.setattr(ranks, "count", lambda: 2)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    network.encoder.register_forward_pre_hook(check)
    with pytest.raises(Failure, match=r"^batch_size = 16 .* 2 processes"):
        learn(contrastive(network))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_learns_resumes_its_scale_and_keeps_ball_and_box(learn, make_network, tmp_path, precision):
    attacked, attack = [], Adversary.attack
    machine = replace(CPU, precision=precision)
    _, exact = learn(contrastive(make_network()))
    with pytest.MonkeyPatch.context() as patch:

        def watch(adversary: Any, network: Network, objective: Any, images: torch.Tensor, *, generator: Any) -> torch.Tensor:
            found = attack(adversary, network, objective, images, generator=generator)
            attacked.append((found.dtype, float((found - images).abs().max()), float(found.min()), float(found.max())))
            return found

        patch.setattr(Adversary, "attack", watch)
        weights, history = learn(contrastive(make_network()), machine)
    assert [record["train/loss"] for record in history] == pytest.approx(
        [record["train/loss"] for record in exact], rel=0.1
    )  # fp16 leaves steps out until its scale fits
    assert {kind for kind, *_ in attacked} == {torch.float32}
    assert all(0.05 < far <= 0.1 + 1e-6 and low >= 0 and high <= 1 for _, far, low, high in attacked)
    learn(contrastive(make_network()), machine, epochs=1, folder=tmp_path / "half")
    again, _ = learn(contrastive(make_network()), machine, folder=tmp_path / "half")
    assert all(torch.equal(again[name], value) for name, value in weights.items())
