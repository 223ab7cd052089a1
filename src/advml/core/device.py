"""Device, threads, precision and random seeds of computations."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from advml import config
from advml.core import memory, ranks
from advml.core.errors import UserError
from advml.core.messages import tell

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precision -> dtype of convolutions and products under autocast


@dataclass(frozen=True)
class Machine:
    """Device and precision of computations.

    Attributes:
        precision: fp32, tf32, bf16 or fp16; images (hence ball and box) and objectives stay in float32 under all of them.
        compile: whether training compiles the encoder.
        micro_batch: images per pass of the encoder in training; None: the whole batch.
    """

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    micro_batch: int | None = None

    def autocast(self, *, training: bool = False) -> AbstractContextManager[object]:
        """Context of autocast: for `bf16`, and in training for `fp16` (elsewhere, unscaled fp16 gradients of an attack would underflow)."""
        half = HALVES.get(self.precision) if training or self.precision != "fp16" else None
        return torch.autocast(self.device.type, dtype=half) if half else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Scaler of the training loss under `fp16`; disabled under other precisions."""
        scales = self.precision == "fp16"
        return torch.amp.GradScaler(self.device.type if scales else "cpu", enabled=scales)

    def images(self, images: Tensor) -> Tensor:
        """Convert images (N, C, H, W), uint8 or float in [0, 1], to float in [0, 1] on the device, channels last (fast convolutions)."""
        images = images.to(self.device, non_blocking=True)
        return (images.float() if images.is_floating_point() else images.float() / 255).to(memory_format=torch.channels_last)

    def free_memory(self) -> int:
        """Free bytes of the device; on a CPU, bytes that this process can still allocate."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        if self.device.type == "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return memory.available()


def double(values: Tensor) -> Tensor:
    """As float64; on the host where the device has none, as Apple's GPUs."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that device or host are out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in ("out of memory", "DefaultCPUAllocator"))


def chosen_device(name: str) -> torch.device:
    """Device that `runtime.device` names; `auto` takes an NVIDIA or AMD GPU, else Apple's, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def machine(runtime: config.Runtime) -> Machine:
    """Apply the `runtime` section to this process (threads, kernels), and return its `Machine`.

    Raises:
        UserError: the device does not exist on this machine.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = runtime.deterministic, not runtime.deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = runtime.precision == "tf32"
    try:
        device = chosen_device(runtime.device)
        if device.type == "cuda" and runtime.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before the device is first used
            torch.use_deterministic_algorithms(True, warn_only=True)
        device = ranks.join(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"runtime.device = {runtime.device!r} is not usable here ({reason}); choose from auto, cpu, cuda, cuda:1, mps"
        ) from None
    if device.type == "cuda" and ranks.count() == 1 and (seen := torch.cuda.device_count()) > 1:
        tell(f"note: {seen} GPUs are visible, one is used; to train a model on all: advml train ... --processes {seen}")
    return Machine(device, runtime.precision, compile=runtime.compile, micro_batch=runtime.micro_batch)


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Context manager: cuDNN uses deterministic kernels; restores its settings afterwards."""
    settings = torch.backends.cudnn
    before = settings.deterministic, settings.benchmark
    settings.deterministic, settings.benchmark = True, False
    try:
        yield
    finally:
        settings.deterministic, settings.benchmark = before


def derived_seed(*parts: object) -> int:
    """63-bit seed that depends on every part, so that no two purposes share random numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_for(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator on the device, seeded by `derived_seed`; CPU and GPU draw different numbers from one seed."""
    return torch.Generator(device).manual_seed(derived_seed(*parts))


@contextlib.contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Context manager: seed the global RNGs of the CPU and of `device`, for models that draw from them; restore them afterwards.

    Other devices are neither seeded nor saved, whereas `torch.manual_seed` would reseed all of them.
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
    """Variant of `own_randomness` for Apple's GPU, which `fork_rng` does not support."""
    state = torch.mps.get_rng_state()
    torch.mps.manual_seed(seed)
    try:
        yield
    finally:
        torch.mps.set_rng_state(state)
