"""What several processes cannot train together is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from advml import config
from advml.core.errors import UserError
from advml.pipeline.training_stage import check_processes

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
    with pytest.raises(UserError, match=f"^{named} .*one process"):
        check_processes(chosen, phases)


@pytest.mark.parametrize("overrides", [["attack.kind=free", "pretrain.CL.attacked=views"], ["pretrain.CL.average=ema"]])
def test_what_a_standard_phase_does_not_use_is_not_refused(monkeypatch, overrides):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(config.load(PARAMS, overrides), {"pretrain.CL": False, "regimes.ST": False})
