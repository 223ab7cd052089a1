"""Training steps, the pass of CKA and an attack of AutoAttack on an accelerator, beside what its matrix units can do.

    python benchmarks/gpu.py [--quick] [--device cuda] [--threads 0] [--seed 0] [--batch 512] [--steps 20] [--minutes 5]

Steps are the trainer's own, by the plans of `advml preset cifar10` (ResNet-18, 3 x 32 x 32, PGD of 5 steps) on random images. Of each
phase the first step does not count, which checks its losses and, where asked, compiles; from the second to the last the device is not
waited for. Floating-point operations of a step are counted by PyTorch's own formulas, in float32; the peak is the fastest product of
square matrices in the same precision. What is not reached in `--minutes` is left out.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import Done, study
from timing import hardware_line, interleaved, options, synchronise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from advml import config
from advml.attacks import autoattack
from advml.attacks.threat_model import ThreatModel
from advml.core import device
from advml.core.device import Machine
from advml.data.datasets import Dataset
from advml.pipeline.plans import pretraining
from advml.similarity.cka import measure
from advml.similarity.layers import layers
from advml.training.checkpoint import Checkpoint
from advml.training.trainer import fit

PHASES = {"ST": ("SL", "st"), "AT": ("SL", "at"), "CL-AT": ("CL", "at")}
KINDS = {
    "fp32": ("fp32", False),
    "fp32, compiled": ("fp32", True),
    "TF32": ("tf32", False),
    "bf16": ("bf16", False),
    "bf16, compiled": ("bf16", True),
}


def peak(machine: Machine, *, size: int, rounds: int) -> float:
    """Operations a second of the fastest of some products of square matrices: 2 size^3 each."""
    one = torch.randn(size, size, device=machine.device, dtype=torch.bfloat16 if machine.precision == "bf16" else torch.float32)
    return 2 * size**3 / min(interleaved({"product": lambda: one @ one}, rounds, warm_up=3)["product"].samples)


def train(chosen: config.Config, dataset: Dataset, machine: Machine, phase: str, *, seed: int, steps: int) -> float:
    """Seconds of a step, the mean over all but the first."""
    scheme, mode = PHASES[phase]
    plan, marks = pretraining(chosen, dataset, scheme=scheme, phase=mode, seed=seed), []

    def note(epoch: int, done: int, loss: Tensor) -> None:
        if done in (1, steps + 1):
            synchronise()
            marks.append(time.perf_counter())
        if done == steps + 1:
            raise Done

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Done):
        fit(plan, machine, checkpoint=Checkpoint(Path(folder), "gpu"), on_batch=note)
    return (marks[1] - marks[0]) / steps


class Operations(TorchDispatchMode):
    """Within: counts those of products and convolutions, backwards too. FlopCounterMode, whose formulas these are, fails in attacks."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result


def operations(chosen: config.Config, dataset: Dataset, machine: Machine, phase: str, *, seed: int) -> float:
    """Of a step: those of two less those of one."""
    found = []
    for steps in (1, 2):
        with Operations() as counter:
            train(chosen, dataset, machine, phase, seed=seed, steps=steps)
        found.append(counter.count)
    return found[1] - found[0]


def memory(machine: Machine) -> str:
    """The peak since it was last asked for."""
    if machine.device.type != "cuda":
        return "-"
    most = torch.cuda.max_memory_allocated(machine.device) / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(machine.device)
    return f"{most:.1f}"


def evaluations(chosen: config.Config, dataset: Dataset, machine: Machine, *, seed: int) -> dict[str, Callable[[], object]]:
    """The pass of CKA over two kinds of input, and APGD, on a network with random weights."""
    network = pretraining(chosen, dataset, scheme="SL", phase="st", seed=seed).network.to(machine.device).eval()
    images = machine.images(dataset.test.images[: chosen.evaluate.batch_size])
    rows, threat = layers(network, images[:2]), ThreatModel("linf", chosen.threat_model.epsilon)
    noisy = threat.random_start(images, generator=torch.Generator().manual_seed(seed))
    parts = list(zip(images.split(100), noisy.split(100), strict=True))
    batches = [{("model", "clean"): clean, ("model", "adversarial"): other} for clean, other in parts]
    strength = autoattack.Strength(steps=chosen.evaluate.steps)
    about = {"threat_model": threat, "classes": 10, "strength": strength, "seed": seed}

    def similarity() -> None:
        with torch.no_grad():
            measure({"model": network}, {"model": rows}, batches)

    with torch.no_grad():  # APGD leaves out what is misclassified from the start
        right = network(images).argmax(1)
    return {
        f"CKA of {len(rows)} layers, clean and perturbed": similarity,
        f"APGD-CE, {strength.steps} steps": lambda: autoattack.attack("apgd-ce", network, images, right, **about),
    }


def main() -> None:
    parser = options("An accelerator's training steps, CKA and APGD.", quick="a tiny network and batch, nothing compiled")
    parser.set_defaults(device=torch.device("cuda"), threads=0)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5)
    arguments = parser.parse_args()
    batch, steps, size, rounds = (8, 1, 128, 2) if arguments.quick else (arguments.batch, arguments.steps, 8192, 10)
    overrides = [f"evaluate.batch_size={2 * batch}"]
    overrides += ["model.backbone=test_resnet", "evaluate.steps=2", "attack.steps=1"] if arguments.quick else []
    began = time.perf_counter()
    chosen, dataset = study(batch, images=batch * (steps + 2), seed=arguments.seed, overrides=tuple(overrides))

    def machine(precision: str, compiled: bool = False) -> Machine:
        about = {"precision": precision, "compile": compiled, "threads": arguments.threads, "deterministic": False}
        return device.machine(config.Runtime(device=str(arguments.device), **about))

    plain = machine("fp32")
    print(f"## On an accelerator\n\n{hardware_line('timm')}; device {arguments.device}; seed {arguments.seed}.")
    print(f"{chosen.model.backbone}, batches of {batch} images, {chosen.attack.steps} steps of PGD in training.\n", flush=True)
    print("| step | precision | images a second | TFLOP/s | of the peak | memory, GiB |\n|---|---|---|---|---|---|")
    work = {phase: operations(chosen, dataset, plain, phase, seed=arguments.seed) for phase in PHASES}
    peaks: dict[str, float] = {}
    for kind, (precision, compiled) in KINDS.items():
        one = machine(precision, compiled)
        peaks[precision] = peaks.get(precision) or peak(one, size=size, rounds=rounds)
        for phase in PHASES if not (compiled and arguments.quick) else ():
            if time.perf_counter() - began > 60 * arguments.minutes:
                print(f"| {phase} | {kind} | left out: {arguments.minutes:g} minutes are over | | | |", flush=True)
                continue
            memory(one)
            seconds = train(chosen, dataset, one, phase, seed=arguments.seed, steps=steps)
            rate, share = work[phase] / seconds / 1e12, work[phase] / seconds / peaks[precision]
            print(f"| {phase} | {kind} | {batch / seconds:.0f} | {rate:.3g} | {share:.0%} | {memory(one)} |", flush=True)
    plain = machine("fp32")  # the settings of the last one hold for the process
    tasks = evaluations(chosen, dataset, plain, seed=arguments.seed)
    for name, timing in interleaved(tasks, 1 if arguments.quick else 3).items():
        print(f"| {name} | fp32 | {2 * batch / timing.median:.0f} | | | {memory(plain)} |", flush=True)
    shown = ", ".join(f"{precision} {rate / 1e12:.3g}" for precision, rate in peaks.items())
    print(f"\nPeaks of products of {size} x {size} matrices, TFLOP/s: {shown}. Took {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
