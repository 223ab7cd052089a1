"""Estimate the cost of a study before it runs: gradient steps, FLOPs, memory and time, stage by stage.

Each kind of work is tried at a small size by the code that will do it, counted and timed; the cost of a stage is that, multiplied by the
number of repetitions. The stages are then scheduled on the slots in the order in which `advml repro` starts them. Evaluations are the
uncertain part: the time of the cascade depends on the number of images that survive (see STANDING), which is not known beforehand. The
labels of the test split are not used: its images are attacked under the labels that an untrained network predicts.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from advml.config import changed
from advml.core.device import Machine
from advml.core.result_cache import Memo
from advml.data import datasets
from advml.data.datasets import Dataset, Split
from advml.evaluation.evaluate import Subject, evaluate
from advml.models.memory_format import place
from advml.models.network import Network
from advml.pipeline.context import Context
from advml.pipeline.plans import finetuning, pretraining
from advml.pipeline.stages.evaluate import settings as settings_of
from advml.recipes import REGIMES, SCHEMES, PhaseName
from advml.similarity.represent import represent
from advml.training.checkpoint import Checkpoint
from advml.training.streams import batches_per_epoch, shares
from advml.training.trainer import Plan, fit

PHASES = get_args(PhaseName)
STANDING = {"st": 0.05, "at": 0.75}  # share of test images that survive the attacks, after standard and adversarial pretraining
BATCHES, SIZES = 4, (16, 64)  # sizes of trials: batches of a training; test images of an evaluation and a representation
# Seconds, measured on two cores of an Intel Xeon with the digits study: overhead of every stage (DVC, process, MLflow), start of the
# command itself, and stages whose time hardly grows with the study.
OVERHEAD, START = 1.9, 8.0
SMALL = {"check": 0.2, "prepare": 1.0, "transfer": 2.0, "report": 6.0}
FIGURES = 1.5  # seconds for the figures of a representation
# Peak of a GPU in fp32, FLOP/s without sparsity, by the vendor's data sheet, and the share of it that convolutions reach.
MACHINES = {"t4": 8.1e12, "v100": 15.7e12, "a100": 19.5e12, "rtx4090": 82.6e12, "h100": 66.9e12, "h200": 66.9e12}
REACHED = 0.3


@dataclass(frozen=True)
class Cost:
    """Cost of work: time in s, images times gradient steps through the encoder, FLOPs, and memory of the process (or GPU) in bytes."""

    seconds: float = 0.0
    gradient_steps: float = 0.0
    flops: float = 0.0
    memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        sums = (getattr(self, key) + getattr(other, key) for key in ("seconds", "gradient_steps", "flops"))
        return Cost(*sums, max(self.memory, other.memory))

    def __mul__(self, times: float) -> Cost:
        return Cost(self.seconds * times, self.gradient_steps * times, self.flops * times, self.memory)

    def on(self, machine: str | None) -> Cost:
        """Cost on one of MACHINES, from its FLOP/s; None: unchanged, as measured on this machine."""
        return replace(self, seconds=self.flops / (MACHINES[machine] * REACHED)) if machine else self


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline with its cost, and the stages that it waits for."""

    name: str
    cost: Cost
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    stages: tuple[Stage, ...]
    seconds: float  # total duration of the command
    total: Cost


@dataclass(frozen=True)
class _Pilot(Context):
    """Context of a study whose data are in memory."""

    data: Dataset

    @property
    def dataset(self) -> Dataset:  # type: ignore[override]
        return self.data


def estimate(context: Context, *, jobs: int, machine: str | None = None) -> Estimate:
    """Estimate the cost of a study from small trials of each kind of work.

    Args:
        jobs: number of stages at a time.
        machine: a key of MACHINES; None: this machine.
    """
    data = context.dataset if context.workspace.prepared.is_dir() else datasets.prepare(context.config.data)
    pilot = _Pilot(context.config, context.workspace, data)
    overhead = Cost(seconds=OVERHEAD)
    stages = tuple(replace(stage, cost=stage.cost.on(machine) + overhead) for stage in _stages(pilot))
    total = sum((stage.cost for stage in stages), Cost())
    return Estimate(stages, START + makespan(stages, jobs), total)


def makespan(stages: Sequence[Stage], jobs: int) -> float:
    """Seconds until all stages are done, `jobs` at a time, starting ready stages in order."""
    waiting, ended, running, now = list(stages), set(), [], 0.0
    while waiting or running:
        for stage in [stage for stage in waiting if ended.issuperset(stage.needs)][: jobs - len(running)]:
            waiting.remove(stage)
            heapq.heappush(running, (now + stage.cost.seconds, stage.name))
        now, name = heapq.heappop(running)
        ended.add(name)
    return now


def _stages(context: _Pilot) -> Iterator[Stage]:
    """Yield all stages with their costs, in the order of dvc.yaml."""
    grid, seeds, small = context.config.grid, context.config.seeds, {name: Cost(seconds=some) for name, some in SMALL.items()}
    yield Stage("check", small["check"])
    yield Stage("prepare", small["prepare"], ("check",))
    trained, models, evaluations = _trained(context), [], {}
    for phase, scheme, seed in product(PHASES, grid.schemes, seeds):  # both phases, like the pipeline, even if no regime needs one of them
        yield Stage(f"pretrain_{phase}@{scheme}-{seed}", trained[scheme, phase][0], ("prepare",))
    for phase in PHASES:
        models += [one for one in product(grid.schemes, grid.regimes, seeds) if REGIMES[one[1]].pretraining == phase]
    for scheme, regime, seed in models:
        phase = REGIMES[regime].pretraining
        cost = trained[scheme, regime][0]
        yield Stage(f"finetune_{phase}@{scheme}-{regime}-{seed}", cost, (f"pretrain_{phase}@{scheme}-{seed}",))
    represented = _representation(context, next(iter(trained.values()))[1])
    names = [f"{REGIMES[regime].pretraining}@{scheme}-{regime}-{seed}" for scheme, regime, seed in models]
    for name, (scheme, regime, _) in zip(names, models, strict=True):
        phase, network = REGIMES[regime].pretraining, trained[scheme, regime][1]
        kind = network.projection_head is not None
        if kind not in evaluations:
            evaluations[kind] = _evaluation(context, network, scheme)
        standing, broken, probes = evaluations[kind]
        cost = standing * STANDING[phase] + broken * (1 - STANDING[phase]) + probes
        yield Stage(f"evaluate_{name}", cost, (f"finetune_{name}",))
    for name in names:
        yield Stage(f"represent_{name}", represented + Cost(seconds=FIGURES), (f"evaluate_{name}",))
    evaluated, described = (tuple(f"{kind}_{name}" for name in names) for kind in ("evaluate", "represent"))
    yield Stage("compare", represented * (0.2 * len(models)), evaluated)
    yield Stage("transfer", small["transfer"], evaluated)
    yield Stage("report", small["report"], (*described, "compare", "transfer"))


def _trained(context: _Pilot) -> dict[tuple[str, str], tuple[Cost, Network]]:
    """(scheme, phase) or (scheme, regime) -> cost of that training, and its network after a few steps."""
    found, settings = {}, (context.config, context.dataset)
    for scheme, phase in product(context.config.grid.schemes, PHASES):
        make = partial(pretraining, *settings, scheme=scheme, phase=phase, seed=0)
        found[scheme, phase] = _training(make, context, frozen=False)
        for regime in (name for name in context.config.grid.regimes if REGIMES[name].pretraining == phase):
            start = found[scheme, phase][1]

            def tuned(start: Network = start, regime: str = regime, scheme: str = scheme) -> Plan:
                return finetuning(*settings, context.machine, copy.deepcopy(start), scheme=scheme, regime=regime, seed=0)

            found[scheme, regime] = _training(tuned, context, frozen=not REGIMES[regime].encoder_learns)
    return found


def _training(make: Any, context: _Pilot, *, frozen: bool) -> tuple[Cost, Network]:
    """Cost of all epochs of a training, and its network; `frozen`: the task first computes the features of all training images."""
    plan = make()
    if plan.task is None:
        return Cost(), place(plan.network, context.machine.device)
    data = plan.dataset
    batches, size = batches_per_epoch(data, plan.phase), plan.phase.batch_size
    first, counted, after = _epoch(make(), context, batches=1, counting=True)
    begun, *ends, last = _epoch(plan, context, batches=min(batches, BATCHES + 1))
    spans = [later.seconds - earlier.seconds for earlier, later in pairwise(ends)] or [ends[0].seconds - begun.seconds]
    batch = replace(_difference(counted, first), seconds=statistics.median(spans))
    validation = replace(_difference(after, counted), seconds=last.seconds - ends[-1].seconds)
    setup = Cost(seconds=max(0.0, ends[0].seconds - begun.seconds - batch.seconds)) if frozen else Cost()
    per_epoch = batch * batches + validation * (len(data.validation) / min(size, len(data.validation)))
    return per_epoch * plan.epochs + setup * (len(data.train) / min(len(data.train), size * min(batches, BATCHES + 1))), plan.network


def _difference(later: Cost, earlier: Cost) -> Cost:
    return replace(later + earlier * -1, memory=later.memory)


def _epoch(plan: Plan, context: _Pilot, *, batches: int, counting: bool = False) -> list[Cost]:
    """Accumulated costs in an epoch of `batches` batches: before the first batch, after each one, and after validation."""
    size, data = plan.phase.batch_size, plan.dataset
    few = replace(data, train=_first(data.train, size * batches), validation=_first(data.validation, size))
    if data.unlabelled is not None:
        own, others = (share * batches for share in shares(len(data.train), len(data.unlabelled), batch_size=size))
        few = replace(few, train=_first(data.train, own), unlabelled=_first(data.unlabelled, others))
    plan = replace(plan, phase=plan.phase.model_copy(update={"epochs": 1}))
    with tempfile.TemporaryDirectory() as folder, _Meter(plan.network, context.machine, counting=counting) as meter:
        marks = [meter.read()]
        fit(
            replace(plan, images=lambda: few),
            context.machine,
            checkpoint=Checkpoint(Path(folder), "pilot"),
            on_batch=lambda *_: marks.append(meter.read()),
        )
        return [*marks, meter.read()]


def _evaluation(context: _Pilot, network: Network, scheme: str) -> tuple[Cost, Cost, Cost]:
    """Costs of an evaluation: if no test image is broken, if all are broken at once, and of the diagnostics."""
    network, machine, total = _classifier(network, context), context.machine, len(context.dataset.test)
    with torch.no_grad():
        answers = torch.cat([network(machine.images(some)).argmax(1).cpu() for some in context.dataset.test.images.split(512)])
    harmless = replace(context, config=changed(context.config, {"threat_model.epsilon": 1e-6, "evaluate.epsilon": None}))

    def run(of: _Pilot, labels: torch.Tensor, count: int, *, probes: int = 0, counting: bool = False) -> Cost:
        count = min(count, total)
        row = SCHEMES[scheme] if network.projection_head is not None else None
        settings = settings_of(of.config, of.dataset, row)
        settings = replace(settings, diagnostics=settings.diagnostics.model_copy(update={"images": probes}), keep=None)
        data = replace(of.dataset, test=Split(of.dataset.test.images[:count], labels[:count]))
        with tempfile.TemporaryDirectory() as folder, _Meter(network, machine, counting=counting) as meter:
            evaluate(Subject("pilot", "", network), data, settings, machine, memo=Memo(Path(folder)))
            return meter.read()

    probed = min(context.config.diagnostics.images, total)
    other = (answers + 1) % len(context.dataset.classes)
    stand = [run(harmless, answers, count) for count in SIZES]
    counts = [run(*of, SIZES[0], counting=True) for of in ((harmless, answers), (context, other))]
    broken = run(context, other, SIZES[1])
    tried = min(probed, SIZES[1])
    probes = (
        _difference(run(context, answers, SIZES[1], probes=tried), run(context, answers, SIZES[1])) * (probed / tried) if tried else Cost()
    )
    line = _line(stand, SIZES, total)
    at_size = _line(stand, SIZES, SIZES[1])
    return (
        replace(counts[0] * (total / min(SIZES[0], total)), seconds=line),
        replace(counts[1] * (total / min(SIZES[0], total)), seconds=broken.seconds * line / at_size),
        probes,
    )


def _representation(context: _Pilot, network: Network) -> Cost:
    """Cost of `represent` for one model, extrapolated from two sizes."""
    network, data, total = _classifier(network, context), context.dataset, len(context.dataset.test)
    found = []
    for count, counting in ((SIZES[0] * 2, False), (SIZES[1] * 2, False), (SIZES[0] * 2, True)):
        share = min(1.0, count / total)
        few = replace(data, **{name: _first(split, round(share * len(split))) for name, split in data.splits.items()})
        with _Meter(network, context.machine, counting=counting) as meter:
            represent(network, few, few.test.images.float() / 255, context.config.similarity, context.machine)
            found.append(meter.read())
    sizes = tuple(2 * size for size in SIZES)
    return replace(found[2] * (total / min(sizes[0], total)), seconds=_line(found[:2], sizes, total))


def _classifier(network: Network, context: _Pilot) -> Network:
    """Copy of a network on the device in eval mode, with a classifier."""
    network = copy.deepcopy(network)
    if network.classifier is None:
        network.attach_classifier(len(context.dataset.classes), seed=0)
    return place(network, context.machine.device).eval()


def _line(costs: Sequence[Cost], sizes: Sequence[int], total: int) -> float:
    """Seconds at `total` by linear extrapolation from two measurements, never with a negative slope."""
    (low, high), (few, more) = (cost.seconds for cost in costs), (min(size, total) for size in sizes)
    slope = max(0.0, (high - low) / (more - few)) if more > few else 0.0
    return high + slope * (total - more)


def _first(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


class _NoModules(contextlib.nullcontext):
    """Replaces FlopCounterMode's count by modules, whose hooks fail when an attack computes gradients of images."""

    parents = frozenset({"Global"})


class _Meter:
    """Context manager that measures the cost of the code inside. With one CPU thread, it measures CPU time instead of elapsed time.

    `counting` FLOPs takes time, so such a run must not be timed.
    """

    def __init__(self, network: Network, machine: Machine, *, counting: bool) -> None:
        self.machine, self.steps = machine, 0
        self.flops = FlopCounterMode(display=False) if counting else None
        if self.flops:
            self.flops.mod_tracker = _NoModules()
        self.own_time = machine.device.type == "cpu" and torch.get_num_threads() == 1
        self.hook = network.encoder.register_forward_hook(lambda *of: self._seen(of[-1])) if counting else None

    def __enter__(self) -> _Meter:
        if self.flops:
            self.flops.__enter__()
        if self.machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.machine.device)
        self.begun = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        if self.flops:
            self.hook.remove()
            self.flops.__exit__(*error)

    def read(self) -> Cost:
        flops = self.flops.get_total_flops() if self.flops else 0
        return Cost(self._now() - self.begun, self.steps, flops, self._memory())

    def _seen(self, output: torch.Tensor) -> None:
        self.steps += len(output) if output.requires_grad else 0

    def _now(self) -> float:
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize(self.machine.device)
        return time.process_time() if self.own_time else time.perf_counter()

    def _memory(self) -> int:
        if self.machine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.machine.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
