"""One phase, planned and fitted outside of any study: the very training of the stages, resumable, and told epoch by epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from advml import config
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.models.network import Network
from advml.pipeline.plans import finetuning, pretraining
from advml.training.checkpoint import Checkpoint
from advml.training.trainer import fit

CPU = Machine(torch.device("cpu"))
PARAMS = Path(__file__).parents[2] / "params.yaml"
TINY = [f"{phase}.{key}" for phase in ("pretrain.CL", "pretrain.SL", "regimes.Full-AT") for key in ("epochs=2", "batch_size=32")]
CONFIG = config.load(PARAMS, ["attack.steps=1", *TINY])


def same(first: Network, second: Network) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


class Pruned(Exception):
    pass


def test_a_phase_ended_by_its_watcher_goes_on_from_that_very_epoch(dataset, tmp_path):
    configuration = config.changed(CONFIG, {"pretrain.CL.epochs": 3})
    whole, history = fit(
        pretraining(configuration, dataset, scheme="CL", phase="at", seed=0), CPU, checkpoint=Checkpoint(tmp_path / "whole", "x")
    )

    def prune(record: dict[str, float]) -> None:
        if record["epoch"] == 2:
            raise Pruned

    told, batches = [], []
    plan = pretraining(configuration, dataset, scheme="CL", phase="at", seed=0)
    with pytest.raises(Pruned):
        fit(plan, CPU, checkpoint=Checkpoint(tmp_path / "part", "x"), on_epoch=prune)
    again, records = fit(
        pretraining(configuration, dataset, scheme="CL", phase="at", seed=0),
        CPU,
        checkpoint=Checkpoint(tmp_path / "part", "x"),
        on_epoch=told.append,
        on_batch=lambda epoch, done, loss: batches.append(epoch),
    )
    assert set(batches) == {3}
    assert told == records == history and same(whole, again)


def test_what_has_nothing_to_learn_is_handed_back_as_it_is(make_network, dataset, tmp_path):
    network = make_network()
    plan = finetuning(CONFIG, dataset, CPU, network, scheme="SL", regime="AT", seed=0)
    made, history = fit(plan, CPU, checkpoint=Checkpoint(tmp_path, "x"))
    assert made is network and history == [] and same(made, make_network())


def test_a_plan_reads_no_image_before_it_is_fitted(make_network, dataset):
    """So that an up-to-date stage, and a refused trial, cost nothing."""
    network = make_network()
    network.encoder.register_forward_hook(lambda *_: pytest.fail("an image passed the encoder"))
    assert finetuning(CONFIG, dataset, CPU, network, scheme="CL", regime="Partial-AT", seed=0).task is not None


# What a phase asks of the backbone


def test_frozen_statistics_of_a_backbone_without_batch_norm_are_refused(make_network, dataset):
    configuration = config.changed(CONFIG, {"regimes.Full-AT.frozen_statistics": True})
    line = "regimes.Full-AT.frozen_statistics = true has no effect: test_vit has no batch norm; set it to false"
    with pytest.raises(UserError, match=f"^{line}$"):
        finetuning(configuration, dataset, CPU, make_network(backbone="test_vit"), scheme="CL", regime="Full-AT", seed=0)
    assert finetuning(configuration, dataset, CPU, make_network(), scheme="CL", regime="Full-AT", seed=0).task is not None


def test_layer_decay_of_a_backbone_without_known_blocks_is_refused(make_network, dataset, monkeypatch):
    configuration = config.changed(CONFIG, {"pretrain.CL.layer_decay": 0.5})
    assert pretraining(configuration, dataset, scheme="CL", phase="at", seed=0).task is not None
    monkeypatch.delattr(type(make_network().encoder), "group_matcher")
    line = r"pretrain\.CL\.layer_decay = 0\.5 needs the blocks of test_resnet, which timm does not define; set it to 1"
    with pytest.raises(UserError, match=f"^{line}$"):
        pretraining(configuration, dataset, scheme="CL", phase="at", seed=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_on_a_cpu_is_refused_in_a_fine_tuning_too_whose_encoder_nothing_here_has_pretrained(make_network, dataset, frozen):
    settings = {"runtime.precision": "bf16", "runtime.device": "cpu", "regimes.Full-AT.frozen_statistics": frozen}
    with pytest.raises(UserError, match=r"runtime\.precision = bf16: .*layer"):
        finetuning(config.changed(CONFIG, settings), dataset, CPU, make_network(stem="native"), scheme="CL", regime="Full-AT", seed=0)


def test_a_phase_of_its_own_radius_and_steps_is_attacked_with_them(make_network, dataset):
    configuration = config.changed(CONFIG, {"regimes.Full-AT.epsilon": 0.05, "pretrain.CL.attack_steps": 3})
    tuned = finetuning(configuration, dataset, CPU, make_network(), scheme="CL", regime="Full-AT", seed=0).adversary.training
    other = pretraining(configuration, dataset, scheme="CL", phase="at", seed=0).adversary.training
    assert (tuned.threat_model.epsilon, tuned.steps) == (0.05, 1)
    assert (other.threat_model.epsilon, other.steps) == (CONFIG.threat_model.epsilon, 3)
