"""The machine and its randomness: device, threads, precision, seeds."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from advml import config
from advml.core.errors import UserError


@dataclass(frozen=True)
class Machine:
    """Where and how precisely to compute."""

    device: torch.device
    precision: str = "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast under `precision: bf16`; the objectives themselves stay in float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def images(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W), or float in [0, 1] -> float in [0, 1] on the device; channels last, which convolutions prefer."""
        images = images.to(self.device)
        return (images.float() if images.is_floating_point() else images.float() / 255).to(memory_format=torch.channels_last)


def machine(runtime: config.Runtime) -> Machine:
    """Set up this process as params.yaml says: threads, deterministic kernels, device.

    Raises:
        UserError: the device does not exist here.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"runtime.device = {runtime.device!r} is not usable here ({reason}); choose from auto, cpu, cuda, cuda:1, mps"
        ) from None
    return Machine(device, runtime.precision)


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Within: cuDNN takes the same kernels for the same shapes. After: its settings are as they were."""
    settings = torch.backends.cudnn
    before = settings.deterministic, settings.benchmark
    settings.deterministic, settings.benchmark = True, False
    try:
        yield
    finally:
        settings.deterministic, settings.benchmark = before


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part, so that no two purposes share random numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_for(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@contextlib.contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Within: models that draw from the global RNG, on the CPU or on `device`, draw from `seed`. After: the RNG is as it was.

    Other devices are neither seeded nor saved: `torch.manual_seed` would reseed all of them.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _own_randomness_of_mps(seed) if device.type == "mps" else nullcontext():
        torch.default_generator.manual_seed(seed)
        for used in devices:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def _own_randomness_of_mps(seed: int) -> Iterator[None]:
    """For Apple's GPU, of which there is one; `fork_rng` does not know it."""
    state = torch.mps.get_rng_state()
    torch.mps.manual_seed(seed)
    try:
        yield
    finally:
        torch.mps.set_rng_state(state)
