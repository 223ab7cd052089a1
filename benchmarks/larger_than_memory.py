"""A folder of images that is larger than the memory: prepared, trained on for an epoch, and evaluated, within a limit.

    python benchmarks/larger_than_memory.py [--quick] [--device cpu] [--threads 1] [--seed 0] [--limit 600] [--images 60000] [--rounds 3]

The limit, in MiB, is that of a control group (version 1, which needs root) that each process enters after its imports; where
there is none it is only compared with the peak of memory that is no mapped file. Each epoch is followed by the same one without
a limit, from files and with all images in memory, which shows the cost of reading alone. The network is a small one, so that
reading images is as large a share of the epoch as it can be. With --quick, images are kept in files although they would fit.
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
from timing import Timing, hardware_line, options

from advml import config
from advml.core import memory
from advml.core.device import Machine
from advml.core.result_cache import Memo
from advml.data import datasets
from advml.data.batches import Feed
from advml.evaluation.attack_suite import attack_suite
from advml.evaluation.evaluate import EvaluationSettings, Subject, evaluate
from advml.models.network import Architecture, Network, build
from advml.training.checkpoint import Checkpoint
from advml.training.tasks import Classification
from advml.training.trainer import train

SCRIPT = Path(__file__).resolve()
SIDE, GROUPS = 64, Path("/sys/fs/cgroup/memory")
DATA = {"name": "folder", "path": "photos", "image_size": SIDE, "validation": 0.02, "test": 0.05}
PHASE = {"epochs": 1, "batch_size": 128, "optimizer": "sgd", "learning_rate": 0.01, "weight_decay": 0.0, "schedule": "constant"}
FROM_FILES, IN_MEMORY = "train an epoch, without a limit", "train an epoch, without a limit, in memory"
WANTED = 1.1  # time of an epoch, over that in memory
ATTACK = {"batch_size": 128, "steps": 1, "adversarial_images": 16}


def draw(count: int, seed: int) -> None:
    """Two classes of pictures, blurred noise in two colours, in the folder `photos`."""
    generator = np.random.default_rng(seed)
    for label, colour in enumerate(((255, 80, 80), (80, 80, 255))):
        (folder := Path("photos", str(label))).mkdir(parents=True)
        for number in range(count // 2):
            coarse = (generator.random((8, 8, 1)) * colour).astype(np.uint8)
            Image.fromarray(coarse).resize((SIDE, SIDE)).save(folder / f"{number}.jpg", quality=80)


def prepare(options: argparse.Namespace) -> Iterator[int]:
    """Each part gets ready, yields the number of its images, and does what is timed."""
    yield options.images
    datasets.save(datasets.prepare(config.Data(**DATA)), "prepared")
    datasets.load("prepared", verified=Path("verified"))


def subject(options: argparse.Namespace) -> tuple[datasets.Dataset, Network]:
    dataset = datasets.load("prepared", verified=Path("verified"))
    architecture = Architecture("test_resnet", "native", {}, 3, SIDE, dataset.mean, dataset.std, 2, None, False, False)
    return dataset, build(architecture, seed=options.seed)


def learn(options: argparse.Namespace, *, in_memory: bool = False) -> Iterator[int]:
    dataset, network = subject(options)
    if in_memory:
        for split in (dataset.train, dataset.validation):
            object.__setattr__(split, "images", split.images.clone())
    machine = Machine(options.device)
    if Feed(dataset.train, machine).fits != in_memory:
        raise SystemExit(f"{options.images} images fit into a limit of {options.limit} MiB; choose more, or a lower limit")
    about = {"adversary": None, "seed": options.seed, "machine": machine, "checkpoint": Checkpoint(Path("state"), str(time.time()))}
    yield len(dataset.train)
    list(train(Classification(network), dataset, config.Phase(**PHASE), **about))
    torch.save(network.state_dict(), "weights")


def measure(options: argparse.Namespace) -> Iterator[int]:
    dataset, network = subject(options)
    network.load_state_dict(torch.load("weights", weights_only=True))
    spec, threat = config.EvaluationAttack(**ATTACK), config.ThreatModelSection(norm="linf", epsilon=2 / 255)
    none = config.WorstCase(attacks=(), restarts=1, steps=1, targets=1, queries=1)
    attacks = attack_suite(spec, threat, none, None, temperature=0.2, classes=2)
    diagnostics = config.Diagnostics(images=0, steps=1, shares=(1,))
    settings = EvaluationSettings(tuple(attacks), 128, 0, diagnostics, config.Corruptions(names=(), severities=(1,)), keep=16)
    yield len(dataset.test)
    evaluate(Subject("X", "-", network), dataset, settings, Machine(options.device), memo=Memo())


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[int]]] = {
    "prepare": prepare,
    "train an epoch": learn,
    FROM_FILES: learn,
    IN_MEMORY: lambda options: learn(options, in_memory=True),
    "evaluate": measure,
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


def timed(part: str, options: argparse.Namespace) -> None:
    """One part, in a process of its own: leaves seconds and processor's seconds per image, and the memory before, in a file."""
    before = anonymous(os.getpid())
    if options.group:
        (options.group / "cgroup.procs").write_text(str(os.getpid()))
    if options.quick or part in (FROM_FILES, IN_MEMORY):
        memory.SHARE = float(part == IN_MEMORY)
    work = PARTS[part](options)
    count = next(work)
    began, processor = time.perf_counter(), time.process_time()
    next(work, None)
    Path("took").write_text(f"{(time.perf_counter() - began) / count} {(time.process_time() - processor) / count} {before}")


def main() -> None:
    parser = options("Data larger than memory.", quick="2,000 images and one round")
    parser.add_argument("--limit", type=int, default=600, help="MiB")
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3, help="of training")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.images, arguments.rounds = 2_000, 1
    if arguments.part:
        timed(arguments.part, arguments)
        return
    size = arguments.images * 3 * SIDE**2 / 2**20
    print(f"## Data larger than memory\n\n{hardware_line('timm')}; device {arguments.device}; seed {arguments.seed}.")
    print(f"{arguments.images} images of 3 x {SIDE} x {SIDE}: {size:.0f} MiB; {memory.available() / 2**30:.1f} GiB are free.\n")
    rounds = {part: arguments.rounds if part.startswith("train") else 1 for part in PARTS}
    found: dict[str, list[tuple[float, float, int]]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), limited(arguments.limit) as group:
        draw(arguments.images, arguments.seed)
        for number in range(arguments.rounds):
            for part in (part for part in PARTS if number < rounds[part]):
                found[part].append(run(part, sys.argv[1:], None if part in (FROM_FILES, IN_MEMORY) else group))
    print(f"| | milliseconds an image | of the processor | peak, MiB (limit {arguments.limit if group else 'none'}) |\n|---|---|---|---|")
    times = {part: [Timing.of(list(column)) for column in zip(*rows, strict=True)] for part, rows in found.items()}
    for part, (seconds, processor, peak) in times.items():
        print(f"| {part} | {seconds.milliseconds} | {processor.milliseconds} | {max(peak.samples):.0f} |")
    for part in ("train an epoch", FROM_FILES):
        ratio = times[part][0].over(times[IN_MEMORY][0])
        print(f"| {part} / in memory | {ratio}; wanted {WANTED}: {'met' if ratio.median <= WANTED else 'missed'} | | |")


if __name__ == "__main__":
    main()
