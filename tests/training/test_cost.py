"""Gradient steps per image are counted as they are made: the counts equal what the formulas say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advml import config
from advml.core.device import Machine
from advml.data.datasets import Split
from advml.recipes import REGIMES, SCHEMES
from advml.training.adversarial_steps import adversarial_training
from advml.training.checkpoint import Checkpoint
from advml.training.cost import GRADIENT_STEPS
from advml.training.tasks import finetuning_task, pretraining_task
from advml.training.trainer import train

CONFIG = config.load(Path(__file__).parents[2] / "params.yaml", ["attack.steps=3"])
CPU = Machine(torch.device("cpu"))
# scheme or regime, attacked, options of the phase, passes of an image in each pass over the data
COUNTS = {
    "SL": ("SL", False, {}, 1),
    "SL, attacked": ("SL", True, {}, 1 + 3 + 1),
    "trades": ("SL", True, {"loss": "trades"}, 1 + 3 + 2),
    "the attacked term alone": ("SL", True, {"clean_weight": 0}, 3 + 1),
    "CL": ("CL", False, {}, 2),
    "CL, attacked": ("CL", True, {}, 2 + 3 + 2),
    "CL, attacked views": ("CL", True, {"attacked": "views"}, 2 + 3 * 2 + 2),
    "CL, three views": ("CL", True, {"views": 3}, 3 + 3 + 2),
    "CL, fast": ("CL", True, {"attack_kind": "fast"}, 2 + 1 + 2),
    "CL, free": ("CL", True, {"attack_kind": "free"}, 3 * 2),
    "EMP, free": ("EMP", True, {"views": 4, "attack_kind": "free"}, 3 * 4),
    "a head": ("ST", False, {}, 0),
    "a head, attacked": ("Partial-AT", True, {}, 3),
    "a head, free": ("Partial-AT", True, {"attack_kind": "free"}, 3),
    "encoder and head": ("Full-AT", True, {}, 1 + 3 + 1),
}


@pytest.mark.parametrize(("name", "attacked", "options", "expected"), COUNTS.values(), ids=COUNTS)
def test_passes_are_counted(tmp_path, dataset, make_network, name, attacked, options, expected):
    plain = {"epochs": 1, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.01, "weight_decay": 0.0, "schedule": "constant"}
    phase, network = config.Phase(**plain, **options), make_network()
    data = replace(dataset, train=Split(dataset.train.images[:8], dataset.train.labels[:8]))
    if name in SCHEMES:
        task = pretraining_task(network, SCHEMES[name], phase, spec=CONFIG.views.supervised, temperature=0.2)
    else:
        task = finetuning_task(network, REGIMES[name], phase, data.train, CPU)
    adversary = adversarial_training(CONFIG.attack, CONFIG.threat_model, phase) if attacked else None
    checkpoint = Checkpoint(tmp_path, "x")
    (record,) = train(task, data, phase, adversary=adversary, seed=0, machine=CPU, checkpoint=checkpoint)
    assert record[GRADIENT_STEPS] == expected and 0 < checkpoint.load().seconds < 60
