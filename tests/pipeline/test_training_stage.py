"""What several processes cannot train together is refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advml import config
from advml.cli.options import start
from advml.core import ranks
from advml.core.device import Machine, machine
from advml.core.errors import UserError
from advml.data.prepared import Split
from advml.pipeline.plans import pretraining
from advml.training.checkpoint import Checkpoint
from advml.training.trainer import fit

PARAMS = Path(__file__).parents[2] / "params.yaml"
HYBRID = "pretrain.CLxSL={epochs: 1, batch_size: 16, optimizer: sgd, learning_rate: 0.1, weight_decay: 0, schedule: constant}"


def cut(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


def test_devices_without_exchanges_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"runtime\.device = mps"):
        machine(config.Runtime(device="mps"))


def test_another_number_of_processes_than_torchrun_has_started_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    start(4)
    with pytest.raises(UserError, match=r"^--processes 2, .* 4"):
        start(2)


def test_a_world_size_that_torchrun_has_not_set_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^WORLD_SIZE = 2 .*RANK"):
        ranks.join(torch.device("cpu"))


def test_batches_that_processes_cannot_share_equally_are_refused_with_compilation(monkeypatch, dataset, tmp_path):
    plan = pretraining(config.load(PARAMS, ["pretrain.SL.batch_size=15", "runtime.device=cpu"]), dataset, scheme="SL", phase="st", seed=0)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(UserError, match=r"^runtime\.compile = true .* 2 processes .*15"):
        fit(plan, Machine(torch.device("cpu"), compile=True), checkpoint=Checkpoint(tmp_path, "x"))


def test_a_part_of_a_batch_with_fewer_images_than_processes_is_refused_before_the_first_step(monkeypatch, dataset, tmp_path):
    """The last batch of validation, and the labelled images of a hybrid's batch."""
    few = replace(dataset, validation=cut(dataset.validation, 17))
    chosen = config.load(PARAMS, ["pretrain.SL.batch_size=16", HYBRID, "runtime.device=cpu"])
    plan = pretraining(chosen, few, scheme="SL", phase="st", seed=0)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(UserError, match=r"validation, 1 images, .* 2 processes; .*batch_size"):
        fit(plan, Machine(torch.device("cpu")), checkpoint=Checkpoint(tmp_path, "x"))
    splits = {"train": cut(dataset.train, 8), "unlabelled": dataset.train}
    plan = pretraining(chosen, replace(dataset, **splits), scheme="CLxSL", phase="st", seed=0)
    monkeypatch.setattr(ranks, "count", lambda: 3)
    with pytest.raises(UserError, match=r" 2 and 14 images, .* 3 processes; start 2 or fewer"):
        fit(plan, Machine(torch.device("cpu")), checkpoint=Checkpoint(tmp_path, "x"))
