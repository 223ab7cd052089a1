"""What several processes cannot train together is refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advml import config
from advml.core import ranks
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.data.prepared import Split
from advml.pipeline.plans import pretraining
from advml.pipeline.training_stage import check_processes
from advml.training.checkpoint import Checkpoint
from advml.training.trainer import fit

PARAMS = Path(__file__).parents[2] / "params.yaml"
HYBRID = "pretrain.CLxSL={epochs: 1, batch_size: 8, optimizer: sgd, learning_rate: 0.1, weight_decay: 0, schedule: constant}"


@pytest.mark.parametrize(
    ("overrides", "phases", "named"),
    [
        ([HYBRID], {"pretrain.CLxSL": False}, "scheme CLxSL"),
        (["pretrain.CL.average=swa"], {"pretrain.CL": False}, r"pretrain\.CL\.average = swa"),
        (["attack.kind=fast"], {"pretrain.SL": False, "regimes.Full-AT": True}, r"attack\.kind = fast"),
        (["regimes.Full-AT.attack_kind=free"], {"regimes.Full-AT": True}, r"regimes\.Full-AT\.attack_kind = free"),
        (["pretrain.CL.attacked=views"], {"pretrain.CL": True}, r"pretrain\.CL\.attacked = views"),
    ],
)
def test_what_needs_one_process_is_refused_under_several_and_only_there(monkeypatch, overrides, phases, named):
    chosen = config.load(PARAMS, overrides)
    check_processes(chosen, phases)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"^{named} .*several processes"):
        check_processes(chosen, phases)


@pytest.mark.parametrize("overrides", [["attack.kind=free", "pretrain.CL.attacked=views"], ["pretrain.CL.average=ema"]])
def test_what_a_standard_phase_does_not_use_is_not_refused(monkeypatch, overrides):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(config.load(PARAMS, overrides), {"pretrain.CL": False, "regimes.ST": False})


def test_a_last_batch_of_validation_with_fewer_images_than_processes_is_refused_before_the_first_step(monkeypatch, dataset, tmp_path):
    few = replace(dataset, validation=Split(dataset.validation.images[:17], dataset.validation.labels[:17]))
    chosen = config.load(PARAMS, ["pretrain.SL.batch_size=16", "runtime.device=cpu"])
    plan = pretraining(chosen, few, scheme="SL", phase="st", seed=0)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(UserError, match=r" 1 images .* 2 processes; .*batch_size"):
        fit(plan, Machine(torch.device("cpu")), checkpoint=Checkpoint(tmp_path, "x"))
