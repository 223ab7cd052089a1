"""The machine and its randomness: device, threads, precision, seeds."""

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

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precision -> type in which autocast computes convolutions and products


@dataclass(frozen=True)
class Machine:
    """Where and how precisely to compute.

    Attributes:
        precision: fp32, tf32, bf16 or fp16; images, and so ball and box, and objectives are in float32 under all of them.
        compile: whether a training compiles its encoder.
        micro_batch: images of a training that pass the encoder at once; None: the whole batch.
    """

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    micro_batch: int | None = None

    def autocast(self, *, training: bool = False) -> AbstractContextManager[object]:
        """Autocast under `precision: bf16`, and in training under `fp16`: gradients of an attack that are scaled by nobody would vanish."""
        half = HALVES.get(self.precision) if training or self.precision != "fp16" else None
        return torch.autocast(self.device.type, dtype=half) if half else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss of a training under `fp16`; does nothing under the other precisions."""
        scales = self.precision == "fp16"
        return torch.amp.GradScaler(self.device.type if scales else "cpu", enabled=scales)

    def images(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W), or float in [0, 1] -> float in [0, 1] on the device; channels last, which convolutions prefer."""
        images = images.to(self.device, non_blocking=True)
        return (images.float() if images.is_floating_point() else images.float() / 255).to(memory_format=torch.channels_last)

    def free_memory(self) -> int:
        """Bytes that the device, or on a CPU this process, can still take."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        if self.device.type == "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return memory.available()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in ("out of memory", "DefaultCPUAllocator"))


def chosen_device(name: str) -> torch.device:
    """The device that `runtime.device` names; `auto` prefers a GPU, NVIDIA's or AMD's to Apple's."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def machine(runtime: config.Runtime) -> Machine:
    """Set up this process as params.yaml says: threads, kernels, device.

    Raises:
        UserError: the device does not exist here.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = runtime.deterministic, not runtime.deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = runtime.precision == "tf32"
    try:
        device = chosen_device(runtime.device)
        if device.type == "cuda" and runtime.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the device is first used
            torch.use_deterministic_algorithms(True, warn_only=True)
        device = ranks.join(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"runtime.device = {runtime.device!r} is not usable here ({reason}); choose from auto, cpu, cuda, cuda:1, mps"
        ) from None
    # The passes of parts are not the same ones in every process, and batch norms would wait for each other
    parts = {f"runtime.micro_batch = {runtime.micro_batch}": runtime.micro_batch is not None}
    ranks.need_one_process({"runtime.compile = true": runtime.compile} | parts)
    if device.type == "cuda" and ranks.count() == 1 and (seen := torch.cuda.device_count()) > 1:
        tell(f"note: {seen} GPUs are visible and one is used; to train a model on all: torchrun --nproc-per-node {seen} -m advml train ...")
    return Machine(device, runtime.precision, compile=runtime.compile, micro_batch=runtime.micro_batch)


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


def generator_for(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on the device, seeded by `derived_seed`; kinds of devices draw different numbers from one seed."""
    return torch.Generator(device).manual_seed(derived_seed(*parts))


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
