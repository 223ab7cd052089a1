"""An evaluation that runs out of memory goes on with fewer images at a time, says so, and finds the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advml import config
from advml.core.device import Machine
from advml.core.errors import Failure
from advml.core.result_cache import Memo
from advml.evaluation.attack_suite import attack_suite
from advml.evaluation.evaluate import Evaluation, EvaluationSettings, Subject, evaluate
from advml.models.adapter import Foreign
from advml.recipes import SCHEMES

PARAMS = Path(__file__).parents[2] / "params.yaml"
QUICK = (
    *("evaluate.steps=2", "evaluate.batch_size=16", "worst_case.attacks=[apgd-ce]", "worst_case.restarts=1"),
    *("worst_case.steps=2", "diagnostics.images=8", "diagnostics.steps=2", "corruptions.names=[fog]", "corruptions.severities=[1]"),
)


def measured(network: nn.Module, dataset, folder: Path, scheme: str | None) -> Evaluation:
    asked = config.load(PARAMS, QUICK)
    about = {"temperature": asked.temperature, "classes": 4}
    attacks = tuple(attack_suite(asked.evaluate, asked.threat_model, asked.worst_case, SCHEMES.get(scheme), **about))
    settings = EvaluationSettings(attacks, 16, 0, asked.diagnostics, asked.corruptions)
    return evaluate(Subject("X", "d" * 64, network), dataset, settings, Machine(torch.device("cpu")), memo=Memo(folder))


def full(module: nn.Module, most: int) -> None:
    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    module.register_forward_pre_hook(check)


@pytest.mark.parametrize("ours", [True, False], ids=["threat model I too", "a module from elsewhere"])
def test_fewer_images_at_a_time_find_the_same(make_network, dataset, tmp_path, capsys, ours):
    network = make_network() if ours else Foreign(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
    scheme = "SCL" if ours else None
    expected = measured(network, dataset, tmp_path / "whole", scheme)
    full(network.encoder if ours else network.module, most=5)
    found = measured(network, dataset, tmp_path / "parts", scheme)
    told = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert [line.split("with ")[1] for line in told] == ["8 images at a time", "4 images at a time"]
    assert found.metrics == expected.metrics
    ignored = {"distance"}  # to the last bits
    rows = [
        [{key: value for key, value in row.items() if key not in ignored} for row in one.samples.to_pylist()] for one in (found, expected)
    ]
    assert rows[0] == rows[1]
    torch.testing.assert_close(found.images, expected.images, atol=1e-4, rtol=0)


def test_a_device_without_memory_for_one_image_is_one_line(make_network, dataset, tmp_path):
    network = make_network()
    full(network.encoder, most=0)
    with pytest.raises(Failure, match=r"the memory of .* does not suffice to attack one image of X"):
        measured(network, dataset, tmp_path, None)
