"""The share of a training step that networks compute in: forward passes of encoder and heads, and backward passes.

    python benchmarks/step.py [--quick] [--device cpu] [--threads 1] [--seed 0] [--batch 64] [--steps 3]

Steps are the trainer's own, by the plans of `advml preset cifar10` (ResNet-18, 3 x 32 x 32, PGD of 5 steps) on random images, at
`--batch` images; the first of each phase does not count. Passes are timed where they happen: by hooks of encoder and heads, and around
PyTorch's backward functions. The rest is what the trainer adds: batches, views, steps of the attack in the ball, optimiser, average.

The head of ST and AT learns from stored features: no image passes the encoder, so nothing is wanted of its share.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import Timing, hardware_line, options, synchronise
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from advml import config
from advml.config.presets import preset
from advml.core.device import Machine
from advml.data.datasets import Dataset, Split
from advml.data.tensors import dataset_of
from advml.models.network import Network
from advml.pipeline.plans import finetuning, pretraining
from advml.recipes import REGIMES
from advml.training import tasks
from advml.training.checkpoint import Checkpoint
from advml.training.trainer import Plan, fit

WANTED = 0.85
SCHEMES = ("SL", "CL", "SCL")


class Stopwatch:
    """Seconds in each kind of call since the last `read`; a call within another one counts for the outer one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running: tuple[str, float] | None = None
        self.depth = 0

    def start(self, kind: str) -> None:
        if not self.depth:
            synchronise()
            self.running = (kind, time.perf_counter())
        self.depth += 1

    def stop(self) -> None:
        self.depth -= 1
        if not self.depth:
            synchronise()
            kind, began = self.running
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - began

    def around(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self.start(kind)
            try:
                return function(*arguments, **named)
            finally:
                self.stop()

        return timed

    def read(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


@contextlib.contextmanager
def watched(network: Network, watch: Stopwatch) -> Iterator[None]:
    """Within: passes of encoder and heads, backward passes, views and steps of the optimiser are timed."""
    with contextlib.ExitStack() as stack:
        for part in (network.encoder, network.classifier, network.projection_head):
            if isinstance(part, nn.Module):
                stack.callback(part.register_forward_pre_hook(lambda *_: watch.start("forward")).remove)
                stack.callback(part.register_forward_hook(lambda *_: watch.stop()).remove)
        places = ((torch.autograd, "grad", "backward"), (torch.autograd, "backward", "backward"), (tasks, "view", "views"))
        for owner, name, kind in places:
            stack.enter_context(mock.patch.object(owner, name, watch.around(kind, getattr(owner, name))))
        stack.callback(register_optimizer_step_pre_hook(lambda *_: watch.start("optimiser")).remove)
        stack.callback(register_optimizer_step_post_hook(lambda *_: watch.stop()).remove)
        yield


class Done(Exception):
    pass


def steps(plan: Plan, machine: Machine, *, count: int) -> tuple[list[float], list[dict[str, float]]]:
    """Seconds of so many steps of a plan, and of what they spent them with."""
    watch, whole, parts, began = Stopwatch(), [], [], 0.0

    def note(epoch: int, done: int, loss: Tensor) -> None:
        nonlocal began
        synchronise()
        now, found = time.perf_counter(), watch.read()
        if (epoch, done) != (1, 1):  # which checks the losses, and in which memory is taken for the first time
            whole.append(now - began)
            parts.append(found)
        if len(whole) == count:
            raise Done
        began = now

    with tempfile.TemporaryDirectory() as folder, watched(plan.network, watch), contextlib.suppress(Done):
        fit(plan, machine, checkpoint=Checkpoint(Path(folder), "step"), on_batch=note)
    return whole, parts


def study(batch: int, *, images: int, seed: int, overrides: tuple[str, ...] = ()) -> tuple[config.Config, Dataset]:
    """The preset cifar10 with batches of one size, and random images in ten classes, which validate too."""
    sections = [*(f"pretrain.{scheme}" for scheme in SCHEMES), *(f"regimes.{regime}" for regime in REGIMES)]
    with tempfile.TemporaryDirectory() as folder:
        (params := Path(folder, "params.yaml")).write_text(preset("cifar10"), encoding="utf-8")
        chosen = config.load(params, [*(f"{section}.batch_size={batch}" for section in sections), *overrides])
    levels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    split = Split(levels, torch.arange(images) % 10)
    return chosen, dataset_of(split, split, [str(label) for label in range(10)])


def plans(chosen: config.Config, dataset: Dataset, machine: Machine, *, seed: int) -> Iterator[tuple[str, Plan]]:
    """Both pretrainings of each scheme, and all ways of fine-tuning."""
    for scheme in SCHEMES:
        for phase in ("st", "at"):
            yield f"{scheme} {phase}", pretraining(chosen, dataset, scheme=scheme, phase=phase, seed=seed)
    for regime in REGIMES:
        network = pretraining(chosen, dataset, scheme="CL", phase="st", seed=seed).network
        yield f"CL {regime}, fine-tuning", finetuning(chosen, dataset, machine, network, scheme="CL", regime=regime, seed=seed)


def main() -> None:
    parser = options(
        "Share of forward and backward passes in a training step.",
        quick="batches of 8 images, one step",
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch, count = (8, 1) if arguments.quick else (arguments.batch, arguments.steps)
    chosen, dataset = study(batch, images=batch * (count + 1), seed=arguments.seed)
    machine = Machine(arguments.device)
    print(f"## Passes in a training step\n\n{hardware_line('timm')}; device {arguments.device}; seed {arguments.seed}.")
    print(f"Batches of {batch} images.\n")
    print("| phase | milliseconds a step | forward and backward | wanted | views | optimiser | other |\n|---|---|---|---|---|---|---|")
    for name, plan in plans(chosen, dataset, machine, seed=arguments.seed):
        whole, parts = steps(plan, machine, count=count)
        share = {
            kind: Timing.of([100 * part.get(kind, 0.0) / seconds for part, seconds in zip(parts, whole, strict=True)])
            for kind in ("forward", "backward", "views", "optimiser")
        }
        passes = Timing.of([100 * (p.get("forward", 0.0) + p.get("backward", 0.0)) / s for p, s in zip(parts, whole, strict=True)])
        other = 100 - passes.median - share["views"].median - share["optimiser"].median
        encodes = "fine-tuning" not in name or plan.adversary
        verdict = ("met" if passes.median >= 100 * WANTED else "missed") if encodes else "-"
        rest = f"{share['views'].median:.1f} % | {share['optimiser'].median:.1f} % | {other:.1f} %"
        print(f"| {name} | {Timing.of(whole).milliseconds} | {passes} % | {verdict} | {rest} |", flush=True)
    print(f"\nWanted: {100 * WANTED:.0f} % or more.")


if __name__ == "__main__":
    main()
