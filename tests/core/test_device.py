"""Random numbers of a block: seeded and put back on the device at work, and on no other."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

from advml.core import device
from advml.core.device import own_randomness


class Generators:
    """Stands in for the generators of three GPUs, of which number 0 is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: object) -> None:
        self.states, self.current, self.module = ["a", "b", "c"], 0, module
        for name in {"get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"} & set(dir(module)):
            monkeypatch.setattr(module, name, getattr(self, name))

    def get_rng_state(self, device: torch.device | None = None) -> str:
        return self.states[device.index if device else 0]

    def set_rng_state(self, state: str, device: torch.device | None = None) -> None:
        self.states[device.index if device else 0] = state

    def manual_seed(self, seed: int) -> None:
        self.states[self.current] = f"seed {seed}"

    def manual_seed_all(self, seed: int) -> None:
        self.states = [f"seed {seed}"] * len(self.states)

    @contextlib.contextmanager
    def device(self, device: torch.device):
        before, self.current = self.current, device.index
        yield
        self.current = before


def test_one_gpu_is_seeded_and_put_back_and_the_others_are_left_alone(monkeypatch):
    gpus = Generators(monkeypatch, torch.cuda)
    monkeypatch.setattr(torch.cuda, "device", gpus.device)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), own_randomness(7, torch.device("cuda:1")):
        assert gpus.states == ["a", "seed 7", "c"]
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
        raise RuntimeError
    assert gpus.states == ["a", "b", "c"] and torch.equal(torch.get_rng_state(), before)


def test_apples_gpu_is_seeded_and_put_back(monkeypatch):
    gpu = Generators(monkeypatch, torch.mps)
    with pytest.raises(RuntimeError), own_randomness(7, torch.device("mps")):
        assert gpu.states[0] == "seed 7"
        raise RuntimeError
    assert gpu.states[0] == "a"


def test_on_the_cpu_no_gpu_is_seeded(monkeypatch):
    gpus = Generators(monkeypatch, torch.cuda)
    with own_randomness(7, torch.device("cpu")):
        pass
    assert gpus.states == ["a", "b", "c"]


def test_float64_is_computed_on_the_host_where_the_device_has_none():
    class OnApples(torch.Tensor):
        """Stands in for a tensor on Apple's GPU, which refuses float64 until it is copied to the host."""

        device = torch.device("mps")

        def cpu(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

        def double(self) -> torch.Tensor:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    values = torch.tensor([0.1, 0.2])
    assert torch.equal(device.double(values.as_subclass(OnApples)), values.double())
    assert device.double(values.to("meta")).device.type == "meta"


def test_float64_is_made_by_that_or_of_tensors_that_are_on_the_host():
    on_host = ("core/device", "evaluation/", "tuning/", "models/bn_folding", "attacks/minimum_norm")
    package = Path(device.__file__).parents[1]
    makes = re.compile(r"\.double\(\)|torch\.(float64|double)\b")
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if makes.search(path.read_text(encoding="utf-8"))}
    assert not {name for name in found if not name.startswith(on_host)}
