"""A folder of images that is larger than the memory: prepared, trained on for an epoch, and evaluated, within a limit.

    python benchmarks/larger_than_memory.py [--quick] [--device cpu] [--threads 1] [--seed 0] [--limit 600]

The limit, in MiB, is that of a control group (version 1, which needs root) that each of the three processes enters after
its imports; where there is none it is only compared with the peak of memory that is no mapped file. Then the same epoch
with all images in memory, without a limit. The network is a small one, so that reading images is as large a share of the
epoch as it can be.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import hardware_line

from advml import config
from advml.core import memory
from advml.core.device import Machine
from advml.core.result_cache import Memo
from advml.data import datasets
from advml.data.batches import Feed
from advml.evaluation.attack_suite import attack_suite
from advml.evaluation.evaluate import EvaluationSettings, Subject, evaluate
from advml.models.network import Architecture, build
from advml.training.checkpoint import Checkpoint
from advml.training.tasks import Classification
from advml.training.trainer import train

SCRIPT = Path(__file__).resolve()
SIDE, GROUPS = 64, Path("/sys/fs/cgroup/memory")
DATA = {"name": "folder", "path": "photos", "image_size": SIDE, "validation": 0.02, "test": 0.05}
PHASE = {"epochs": 1, "batch_size": 128, "optimizer": "sgd", "learning_rate": 0.01, "weight_decay": 0.0, "schedule": "constant"}
ATTACK = {"batch_size": 128, "steps": 1, "adversarial_images": 16}


def draw(count: int, seed: int) -> None:
    """Two classes of pictures, blurred noise in two colours, in the folder `photos`."""
    generator = np.random.default_rng(seed)
    for label, colour in enumerate(((255, 80, 80), (80, 80, 255))):
        (folder := Path("photos", str(label))).mkdir(parents=True)
        for number in range(count // 2):
            coarse = (generator.random((8, 8, 1)) * colour).astype(np.uint8)
            Image.fromarray(coarse).resize((SIDE, SIDE)).save(folder / f"{number}.jpg", quality=80)


def prepare(options: argparse.Namespace) -> int:
    dataset = datasets.prepare(config.Data(**DATA))
    datasets.save(dataset, "prepared")
    return sum(map(len, dataset.splits.values()))


def learn(options: argparse.Namespace, *, in_memory: bool = False) -> int:
    dataset = datasets.load("prepared", verified=Path("verified"))
    if in_memory:
        for split in (dataset.train, dataset.validation):
            object.__setattr__(split, "images", split.images.clone())
    machine = Machine(options.device)
    print(f"kept in memory: {Feed(dataset.train, machine).fits}", file=sys.stderr)
    network = build(Architecture("test_resnet", "native", {}, 3, SIDE, dataset.mean, dataset.std, 2, None, False, False), seed=options.seed)
    about = {"adversary": None, "seed": options.seed, "machine": machine, "checkpoint": Checkpoint(Path("state"), str(time.time()))}
    list(train(Classification(network), dataset, config.Phase(**PHASE), **about))
    torch.save(network.state_dict(), "weights")
    return len(dataset.train)


def measure(options: argparse.Namespace) -> int:
    dataset = datasets.load("prepared", verified=Path("verified"))
    network = build(Architecture("test_resnet", "native", {}, 3, SIDE, dataset.mean, dataset.std, 2, None, False, False), seed=options.seed)
    network.load_state_dict(torch.load("weights", weights_only=True))
    spec, threat = config.EvaluationAttack(**ATTACK), config.ThreatModelSection(norm="linf", epsilon=2 / 255)
    none = config.WorstCase(attacks=(), restarts=1, steps=1, targets=1, queries=1)
    attacks = attack_suite(spec, threat, none, None, temperature=0.2, classes=2)
    diagnostics = config.Diagnostics(images=0, steps=1, shares=(1,))
    settings = EvaluationSettings(tuple(attacks), 128, 0, diagnostics, config.Corruptions(names=(), severities=(1,)), keep=16)
    found = evaluate(Subject("X", "-", network), dataset, settings, Machine(options.device), memo=Memo())
    print(f"clean accuracy {found.metrics['accuracy/clean']:.3f}", file=sys.stderr)
    return len(dataset.test)


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "prepare": prepare,
    "train an epoch": learn,
    "evaluate": measure,
    "train an epoch, in memory": lambda options: learn(options, in_memory=True),
}


@contextlib.contextmanager
def limited(megabytes: int) -> Iterator[Path | None]:
    """A control group; the processes in it get this much memory beyond what they had when they entered."""
    group = GROUPS / f"advml-benchmark-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(megabytes * 2**20))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def anonymous(process: int) -> int:
    """KiB of a process that are no mapped file."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def run(part: str, arguments: list[str], group: Path | None) -> tuple[float, float, int]:
    """Seconds and processor's seconds per image, and the peak of memory beyond the imports that is no mapped file, in MiB."""
    peak, more = 0, ["--group", str(group)] if group else []
    process = subprocess.Popen([sys.executable, SCRIPT, *arguments, "--part", part, *more])
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration, ProcessLookupError):
            peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{part}: ended with {process.returncode}")
    seconds, processor, before = map(float, Path("took").read_text().split())
    return seconds, processor, (peak - int(before)) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Data larger than memory.")
    parser.add_argument("--quick", action="store_true", help="2,000 images instead of 60,000")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=600, help="MiB")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part:
        before = anonymous(os.getpid())
        if options.group:
            (options.group / "cgroup.procs").write_text(str(os.getpid()))
        began, processor = time.perf_counter(), time.process_time()
        count = PARTS[options.part](options)
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        Path("took").write_text(f"{seconds / count} {processor / count} {before}")
        return
    count = 2_000 if options.quick else 60_000
    print(f"## Data larger than memory\n\n{hardware_line('timm')}; device {options.device}; seed {options.seed}.")
    print(f"{count} images of 3 x {SIDE} x {SIDE}: {count * 3 * SIDE**2 / 2**20:.0f} MiB; {memory.available() / 2**30:.1f} GiB are free.\n")
    arguments = sys.argv[1:]
    print(f"| | milliseconds an image | of the processor | peak, MiB (limit {options.limit}) |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), limited(options.limit) as group:
        draw(count, options.seed)
        for part in PARTS:
            seconds, processor, peak = run(part, arguments, None if part.endswith("memory") else group)
            print(f"| {part} | {1e3 * seconds:.2f} | {1e3 * processor:.2f} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
