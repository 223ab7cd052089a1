"""Two processes that share every batch learn what one process learns, up to rounding, also after they were killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from advml import config
from advml.core import ranks
from advml.core.device import machine
from advml.data.datasets import Split
from advml.recipes import REGIMES, SCHEMES
from advml.training.adversarial_steps import adversarial_training
from advml.training.checkpoint import Checkpoint
from advml.training.tasks import finetuning_task, pretraining_task
from advml.training.trainer import train

pytestmark = pytest.mark.cluster
PHASE = config.Phase(epochs=2, batch_size=15, optimizer="sgd", learning_rate=0.05, weight_decay=0.0, schedule="constant", gradient_clip=1.0)
OF_VIEWS = PHASE.model_copy(update={"views": 3, "average": "ema", "average_decay": 0.5})
VIEW = config.View(shift=0.2, rotation=10, brightness=0.3)


def learn(network: Any, dataset: Any, name: str, folder: Path, kill: bool = False) -> None:
    """Train SCL's encoder or a classifier on it, in as many processes as there are; the first one writes weights and history."""
    one = machine(config.Runtime(device="cpu", threads=1))
    scheme, regime = SCHEMES["SCL"], REGIMES["Full-AT"]
    phase = OF_VIEWS if name == "SCL at" else PHASE
    if name == "SCL at":
        task = pretraining_task(network, scheme, phase, spec=VIEW, temperature=0.2)
    else:
        task = finetuning_task(network, regime, phase, dataset.train, one)
    mode = "train" if name == "SCL at, attacked in train mode" else "eval"
    attack = config.TrainAttack(steps=2, batch_norm=mode)
    adversary = adversarial_training(attack, config.ThreatModelSection(norm="linf", epsilon=0.1), phase)
    checkpoint = Checkpoint(folder, "same" if ranks.is_first() else None)
    history = []
    for record in train(task, dataset, phase, adversary=adversary, seed=3, machine=one, checkpoint=checkpoint):
        history.append(record)
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
    if ranks.is_first():
        torch.save(network.state_dict(), folder / "weights")
        (folder / "history").write_text(json.dumps(history))
    ranks.leave()


def child(rank: int, port: int, *arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    learn(*arguments)


def in_two(*arguments: Any) -> list[int]:
    """Exit codes of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")
    processes = [forked.Process(target=child, args=(rank, port, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("name", ["SCL at", "Full-AT"])
def test_two_processes_learn_what_one_learns_although_they_were_killed(tmp_path, dataset, make_network, name):
    """Batches of 15 images: parts of 8 and 7; the last batch of validation has an odd number too."""
    some = lambda split, n: Split(split.images[:n], split.labels[:n])  # noqa: E731
    data = replace(dataset, train=some(dataset.train, 30), validation=some(dataset.validation, 20))
    learn(make_network(), data, name, tmp_path / "one")
    assert in_two(make_network(), data, name, tmp_path / "two", True) == [-signal.SIGKILL] * 2
    assert not (tmp_path / "two" / "weights").exists() and Checkpoint(tmp_path / "two").load().epoch == 1
    assert in_two(make_network(), data, name, tmp_path / "two") == [0, 0]
    one, two = (json.loads((tmp_path / folder / "history").read_text()) for folder in ("one", "two"))
    assert [list(record.values()) for record in two] == [pytest.approx(list(record.values()), rel=1e-3) for record in one]
    expected, found = (torch.load(tmp_path / folder / "weights", weights_only=True) for folder in ("one", "two"))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
