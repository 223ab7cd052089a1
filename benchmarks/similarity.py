"""CKA of a network's layers against torch_cka and pytorch-cka: the same layers of the same network on the same images.

    python benchmarks/similarity.py [--quick] [--batch 32] [--threads 1] [--seed 0]

The network is timm's ResNet-18 with our small stem, in eval mode, on 3x32x32 images; all its layers are compared with one
another. pytorch-cka compares the network with itself, which it does in one pass; torch_cka, which would mix up the passes of
one network, with a copy. Neither peer is charged for a data loader's work or for a graph of gradients. Network and images
have channels last for all, as in our studies.

Memory is by how much the peak is above that of a plain forward pass, each in a process of its own. Both peers keep the
tensors that layers hand out, and in-place layers overwrite some of them before the Gram matrix is made: the largest
difference from our matrix is given for the rows that stay as they were, and for the others.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import psutil
import torch
from timing import hardware_line, interleaved
from torch import Tensor, nn
from torch.utils.data import DataLoader

from advml.models.memory_format import place
from advml.models.network import Architecture, Network, build
from advml.similarity.cka import measure
from advml.similarity.layers import Layer, layers

PLAIN, OURS, ROUNDED = "one plain pass", "advml", "advml, bfloat16"
PEERS = {"torch_cka": "torch-cka", "pytorch-cka": "pytorch-cka"}  # and their packages
MODULES = {"torch_cka": "torch_cka", "pytorch-cka": "cka"}
PRESENT = [peer for peer in PEERS if importlib.util.find_spec(MODULES[peer])]
Task = Callable[[], np.ndarray | None]


@dataclass(frozen=True)
class Setup:
    network: Network
    rows: list[Layer]
    batches: list[Tensor]

    @classmethod
    def of(cls, *, count: int, batch: int, seed: int) -> Setup:
        channel = (0.5, 0.5, 0.5)
        network = build(Architecture("resnet18", "small", {}, 3, 32, channel, channel, 10, None, False, False), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # timm starts some at zero: dead layers
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
        images = torch.rand(count, 3, 8, 8, generator=generator)
        large = nn.functional.interpolate(images, size=(32, 32), mode="bilinear").to(memory_format=torch.channels_last)
        batches = list(large.split(batch))
        place(network, large.device)
        with torch.no_grad():
            network.train()(batches[0][:32])
        return cls(network.eval(), layers(network, batches[0][:2], select=["all"]), batches)

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    def plain(self) -> None:
        with torch.no_grad():
            for images in self.batches:
                self.network(images)

    def ours(self, gram: str) -> np.ndarray:
        key = ("net", "clean")
        similarity = measure({"net": self.network}, {"net": self.rows}, ({key: images} for images in self.batches), gram=gram)
        return similarity.cka(key, key)

    def loader(self) -> DataLoader:
        return DataLoader([(images,) for images in self.batches], batch_size=None)

    def torch_cka(self) -> np.ndarray:
        import torch_cka.cka

        torch_cka.cka.tqdm = lambda batches, **_: batches
        pair = [copy.deepcopy(self.network) for _ in range(2)]  # its hooks stay
        peer = torch_cka.CKA(*pair, "first", "second", self.names, self.names, device="cpu")
        with torch.no_grad():
            peer.compare(self.loader(), self.loader())
        return peer.hsic_matrix.numpy()  # in execution order, whatever its labels say

    def pytorch_cka(self) -> np.ndarray:
        import cka

        (matrix,) = cka.compute_cka(self.network, self.network, self.loader(), layers=self.names, device="cpu", progress=False)
        return matrix.numpy()

    def tasks(self) -> dict[str, Task]:
        listed: dict[str, Task] = {PLAIN: self.plain, OURS: lambda: self.ours("float32"), ROUNDED: lambda: self.ours("bfloat16")}
        return listed | {peer: {"torch_cka": self.torch_cka, "pytorch-cka": self.pytorch_cka}[peer] for peer in PRESENT}

    def kept_whole(self) -> np.ndarray:
        """Of every row: nothing changes its output in place after the layer has handed it out."""
        modules, seen = dict(self.network.named_modules()), []
        handles = [modules[name].register_forward_hook(lambda m, i, out: seen.append((out, out._version))) for name in self.names]
        with torch.no_grad():
            self.network(self.batches[0][:2])
        for handle in handles:
            handle.remove()
        return np.array([output._version == at_first for output, at_first in seen])


def peak_memory(task: str, arguments: list[str]) -> float:
    """MiB by which a task raises the memory of a fresh process, at its peak; glibc is told to hand back what is freed."""
    command = [sys.executable, __file__, "--memory-of", task, *arguments]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def print_peak_memory(setup: Setup, task: str) -> None:
    setup.plain()
    process, done, seen = psutil.Process(), threading.Event(), []
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    setup.tasks()[task]()
    done.set()
    watcher.join()
    print((max(seen) - before) / 2**20)


def compare(setup: Setup, rounds: int, memory: Callable[[str], float]) -> None:
    found: dict[str, np.ndarray] = {}

    def keeping(name: str, task: Task) -> Callable[[], None]:
        def run() -> None:
            found[name] = task()

        return run

    times = interleaved({name: keeping(name, task) for name, task in setup.tasks().items()}, rounds)
    peak = {name: memory(name) for name in times}
    extra = {name: max(value - peak[PLAIN], 0) for name, value in peak.items()}
    whole = setup.kept_whole()
    inside, batch = np.ix_(whole, whole), len(setup.batches[0])
    count = sum(map(len, setup.batches))
    kept = f"off by, {whole.sum()} rows kept | off by, {(~whole).sum()} overwritten"
    print(f"| {len(setup.rows)} layers of ResNet-18, {count} images in batches of {batch} | seconds | times ours | extra MiB | {kept} |")
    print("|---|---|---|---|---|---|")
    for name, timing in times.items():
        cells = ["-", "-"]
        if name not in (PLAIN, OURS):
            difference = np.abs(found[name] - found[OURS])
            cells = [f"{difference[inside].max():.1e}", f"{difference[~whole].max():.1e}"]
        print(f"| {name} | {timing} | {timing.over(times[OURS])} | {extra[name]:.0f} | {' | '.join(cells)} |")
    missing = [f"{PEERS[peer]}" for peer in PEERS if peer not in PRESENT]
    if missing:
        print(f"\nLeft out: {', '.join(missing)}; for their rows: pip install --no-deps {' '.join(missing)}")
    print("\nTargets:")
    rounded = np.abs(found[ROUNDED] - found[OURS]).max()
    for peer, most in {"torch_cka": "1/6", "pytorch-cka": "1"}.items():
        if peer in PRESENT:
            share = extra[OURS] / extra[peer]
            print(f"- at most {most} of {peer}'s time, 1/4 of its memory: {times[OURS].over(times[peer])}, {share:.2g}")
    if "pytorch-cka" in PRESENT:
        ratio = times[ROUNDED].over(times["pytorch-cka"])
        print(f"- bfloat16 in at most 0.8 of pytorch-cka's time, errors below 5e-4: {ratio}, {rounded:.1e}")
    print(
        f"\nFloors: a plain pass is {times[PLAIN].over(times[OURS])} of ours; bfloat16 takes {times[ROUNDED].over(times[OURS])} of float32."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="CKA against its peers.")
    parser.add_argument("--quick", action="store_true", help="few images and rounds")
    parser.add_argument("--batch", type=int, default=32, help="images per CKA batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the peers' advice
    count, batch, rounds = (64, 32, 2) if options.quick else (256, options.batch, 3)
    setup = Setup.of(count=count, batch=batch, seed=options.seed)
    if options.memory_of:
        print_peak_memory(setup, options.memory_of)
        return
    arguments = ["--batch", str(options.batch), "--threads", str(options.threads), "--seed", str(options.seed)]
    arguments += ["--quick"] if options.quick else []
    peers = ", ".join(f"{PEERS[peer]} {version(PEERS[peer])}" for peer in PRESENT)
    print(f"## CKA\n\n{hardware_line('timm')}{', ' if peers else ''}{peers}; seed {options.seed}.")
    print(f"Median (quartiles) of {rounds} interleaved rounds.\n")
    compare(setup, rounds, lambda task: peak_memory(task, arguments))


if __name__ == "__main__":
    main()
