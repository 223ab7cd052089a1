"""Several processes that share every batch learn what one process learns, up to rounding, also after they were killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from advml import config
from advml.core import ranks
from advml.core.device import machine
from advml.core.errors import Failure
from advml.data.datasets import Dataset, Split
from advml.models.network import Network
from advml.recipes import REGIMES, SCHEMES
from advml.training.adversarial_steps import adversarial_training
from advml.training.checkpoint import Checkpoint
from advml.training.streams import shares
from advml.training.tasks import finetuning_task, hybrid_task, pretraining_task
from advml.training.trainer import train

pytestmark = pytest.mark.cluster
CPU = torch.device("cpu")
VIEW = config.View(shift=0.2, rotation=10, brightness=0.3)
# In an L2 ball and with few steps, because rounding grows at every sign of a gradient and with every step
THREAT = config.ThreatModelSection(norm="l2", epsilon=0.5)
PHASE = {"epochs": 2, "optimizer": "sgd", "learning_rate": 0.005, "weight_decay": 0, "schedule": "constant", "gradient_clip": 1}


@dataclass(frozen=True)
class Training:
    """An adversarial training of a scheme's encoder or of a regime's classifier, and the settings that it changes."""

    of: str
    phase: dict[str, Any] = field(default_factory=dict)
    attack: dict[str, Any] = field(default_factory=dict)
    micro_batch: int | None = None
    compile: bool = False
    network: dict[str, Any] = field(default_factory=dict)  # changes of the network

    def run(self, network: Network, dataset: Dataset, folder: Path, ended: Callable[[], bool] = lambda: False) -> None:
        """Train in as many processes as there are, until an epoch after which it has `ended`; the first one writes weights and history."""
        one = machine(config.Runtime(device="cpu", threads=1, micro_batch=self.micro_batch, compile=self.compile))
        phase = config.Phase(**PHASE | {"batch_size": 31} | self.phase)
        data, task = self._task(network, dataset, phase, one)
        adversary = adversarial_training(config.TrainAttack(**{"steps": 2} | self.attack), THREAT, phase)
        checkpoint = Checkpoint(folder, "same" if ranks.is_first() else None)
        ranks.barrier()
        history = []
        shown: list[float] = []
        note = lambda epoch, done, loss: shown.append(float(loss))  # noqa: E731
        for record in train(task, data, phase, adversary=adversary, seed=3, machine=one, checkpoint=checkpoint, on_batch=note):
            history.append(record)
            if shown:  # no epoch of an earlier process
                whole = record["train/loss"] + record.get("train/adversarial_loss", 0)
                assert sum(shown) / len(shown) == pytest.approx(whole, rel=0.3)  # the bar's loss is of the own images
                shown.clear()
            if ended():
                break
        ranks.barrier()
        if ranks.is_first():
            torch.save(network.state_dict(), folder / "weights")
            (folder / "history").write_text(json.dumps(history))

    def _task(self, network: Network, dataset: Dataset, phase: config.Phase, one: Any) -> tuple[Dataset, Any]:
        """Batches of 31 images, of which 13 have labels in a hybrid; the last batch of validation has an odd number, too."""
        some = lambda split, start, end: Split(split.images[start:end], split.labels[start:end])  # noqa: E731
        data = replace(dataset, train=some(dataset.train, 0, 62), validation=some(dataset.validation, 0, 20))
        if self.of in REGIMES:
            return data, finetuning_task(network, REGIMES[self.of], phase, data.train, one)
        if not (scheme := SCHEMES[self.of]).terms:
            return data, pretraining_task(network, scheme, phase, spec=VIEW, temperature=0.2)
        data = replace(data, train=some(dataset.train, 0, 26), unlabelled=some(dataset.train, 26, 62))
        sizes = shares(26, 36, batch_size=phase.batch_size)
        return data, hybrid_task(
            network, scheme, phase, views=config.Views(supervised=VIEW, contrastive=VIEW), temperature=0.2, sizes=sizes
        )


VIEWS, SWA = {"attacked": "views"}, {"average": "swa", "average_start": 0.0}
DROPOUT = {"drop_rate": 0.2, "drop_path_rate": 0.2}
RATES = DROPOUT | {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.2, "patch_drop_rate": 0.3}
VIT = {"backbone": "test_vit", "options": {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2} | RATES}
THREE_VIEWS = Training("SCL", {"views": 3, "average": "ema", "average_decay": 0.5})
TRAININGS = {
    "fast, of views, swa": Training("CL", VIEWS | SWA | {"epsilon": 0.15}, {"kind": "fast"}),
    "free": Training("Full-AT", {"epochs": 4}, {"kind": "free"}),
    "micro-batches, batch norms in train mode under attack": Training(
        "EMP", {"views": 2}, {"batch_norm": "train", "steps": 1}, micro_batch=16
    ),
    "dropout, stochastic depth": Training("SL", network={"options": DROPOUT}),
    "dropout, micro-batches": Training("SCL", {"views": 2}, micro_batch=16, network={"options": DROPOUT}),
    "hybrid, of views, swa": Training("CLxSL", VIEWS | SWA),
    "hybrid, free, of views": Training("CLxSL", VIEWS | {"epochs": 4}, {"kind": "free"}),
}


def child(rank: int, count: int, port: int, work: Callable[[], None]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    work()
    ranks.leave()


def in_processes(work: Callable[[], None], *, count: int = 2) -> list[int]:
    """Exit codes of processes that do some work."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")
    processes = [forked.Process(target=child, args=(rank, count, port, work)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    return [process.exitcode for process in processes]


def assert_same(found: Path, expected: Path, start: Network) -> None:
    """Two trainings have the same records, and weights that are far closer to each other than to those at the start."""
    ours, one = (json.loads((folder / "history").read_text()) for folder in (found, expected))
    assert [list(record.values()) for record in ours] == [pytest.approx(list(record.values()), rel=1e-3) for record in one]
    ours, one = (torch.load(folder / "weights", weights_only=True) for folder in (found, expected))
    initial = start.state_dict()
    distance = lambda one, other: torch.stack([(one[key] - other[key]).float().norm() for key in one]).norm()  # noqa: E731
    assert distance(ours, one) < 1e-2 * distance(one, initial)


def test_two_processes_that_were_killed_learn_what_one_learns(tmp_path, dataset, make_network):
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    THREE_VIEWS.run(make_network(), dataset, tmp_path / "one")
    assert in_processes(lambda: THREE_VIEWS.run(make_network(), dataset, tmp_path / "two", ended=kill)) == [-signal.SIGKILL] * 2
    assert not (tmp_path / "two" / "weights").exists() and Checkpoint(tmp_path / "two").load().epoch == 1
    assert in_processes(lambda: THREE_VIEWS.run(make_network(), dataset, tmp_path / "two")) == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "one", make_network())


def test_every_kind_of_training_is_resumed_by_any_number_of_processes(tmp_path, dataset, make_network):
    """Two processes end after an epoch; they resume, and so does one with a copy of their state."""

    def work() -> None:
        for name, training in TRAININGS.items():
            training.run(make_network(**training.network), dataset, tmp_path / "two" / name, ended=lambda: True)
            if ranks.is_first():
                shutil.copytree(tmp_path / "two" / name, tmp_path / "continued" / name)
            training.run(make_network(**training.network), dataset, tmp_path / "two" / name)

    assert in_processes(work) == [0, 0]
    for name, training in TRAININGS.items():
        training.run(make_network(**training.network), dataset, tmp_path / "one" / name)
        training.run(make_network(**training.network), dataset, tmp_path / "continued" / name)
        for folder in ("two", "continued"):
            assert_same(tmp_path / folder / name, tmp_path / "one" / name, make_network(**training.network))


def test_three_processes_learn_with_every_kind_of_dropout_what_one_learns(tmp_path, dataset, make_network):
    training = Training("SCL", {"views": 3}, micro_batch=20, network=VIT)
    assert in_processes(lambda: training.run(make_network(**VIT), dataset, tmp_path / "three"), count=3) == [0, 0, 0]
    training.run(make_network(**VIT), dataset, tmp_path / "one")
    assert_same(tmp_path / "three", tmp_path / "one", make_network(**VIT))


def test_a_layer_that_couples_images_unlike_a_batch_norm_ends_the_training(tmp_path, dataset, make_network):
    network = {"backbone": "test_efficientnet", "options": {"norm_layer": "evonormb0"}}

    def work() -> None:
        with pytest.raises(Failure, match=r"^encoder\..*running_var .* epoch 1; "):
            Training("SL", network=network).run(make_network(**network), dataset, tmp_path)

    assert in_processes(work) == [0, 0]


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.compile looks at it
def test_two_processes_compile_the_encoder(tmp_path, dataset, make_network):
    training = Training("Full-AT", {"batch_size": 20, "epochs": 1}, {"steps": 1}, network={"options": DROPOUT})
    compiled = replace(training, compile=True)
    assert in_processes(lambda: compiled.run(make_network(**training.network), dataset, tmp_path / "two")) == [0, 0]
    training.run(make_network(**training.network), dataset, tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one", make_network(**training.network))


def noise(images: int) -> list[torch.Tensor]:
    """What layers draw for images of this process: for vectors, maps in three orders in memory, windows, of which an image has 4, half
    precision, attention, and the order of patches; the last two are for a table without images."""
    torch.manual_seed(0)
    maps, tokens = torch.ones(images, 3, 4, 4), torch.linspace(0, 1, 12).view(1, 1, 4, 3).expand(images, -1, -1, -1)
    return [
        F.dropout(torch.ones(images, 5)),
        F.dropout(maps, 0.3),
        F.dropout(maps.to(memory_format=torch.channels_last), 0.3),
        F.dropout(maps.flatten(2).mT, 0.3),
        F.dropout2d(maps),
        torch.empty(images, 1, 1).bernoulli_(0.5),
        torch.empty(images, 2).normal_(),
        F.dropout(torch.ones(4 * images, 5)).unflatten(0, (images, 4)),
        F.scaled_dot_product_attention(tokens, tokens.cos(), tokens.sin(), dropout_p=0.3, scale=9.0),
        torch.randn(images, 4),
        F.dropout(torch.ones(1, 40)),
        torch.empty(()).uniform_(),
    ]


def test_random_layers_draw_the_same_in_any_number_of_processes(tmp_path):
    def work() -> None:
        machine(config.Runtime(device="cpu", threads=1))
        own = ranks.part(31)
        with ranks.shared(31), ranks.computing(*ranks.passes(own, 1, CPU)):
            torch.save(noise(own), tmp_path / str(ranks.number()))

    assert in_processes(work, count=3) == [0, 0, 0]
    *expected, table, number = noise(31)
    for rank in range(3):
        *found, ours, own = torch.load(tmp_path / str(rank), weights_only=True)
        assert all(torch.equal(part, whole[rank::3]) for part, whole in zip(found, expected, strict=True))
        assert torch.equal(ours, table) and torch.equal(own, number)


def test_dropout_scales_features_of_half_precision_exactly(tmp_path):
    """1 / 0.9 is 1.1094 in bfloat16, by which features would be too small."""

    def work() -> None:
        machine(config.Runtime(device="cpu", threads=1))
        with ranks.shared(64), ranks.computing(*ranks.passes(32, 1, CPU)):
            features = torch.linspace(1, 2, 9).bfloat16().expand(32, -1)
            kept = F.dropout(features, 0.1)
        assert torch.equal(kept, features / 0.9 * (kept > 0))

    assert in_processes(work) == [0, 0]
