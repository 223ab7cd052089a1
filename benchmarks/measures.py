"""Cost of every measure of similarity beside CKA's and beside a forward pass: the blocks of one network with one another.

    python benchmarks/measures.py [--quick] [--threads 1] [--seed 0]

The network is that of benchmarks/similarity.py, on 256 images of 3x32x32. CKA's time is that of its whole pass, which is of whole layers.
The others are of pooled features, which one pass makes for all: `pooled features` is that pass, and the time of a measure what comes on
top of it, for values alone and with those that intervals need, which leave out blocks of images.
"""

from __future__ import annotations

import argparse

import torch
from similarity import Setup
from threadpoolctl import threadpool_limits
from timing import Timing, hardware_line, interleaved

from advml.similarity.alternatives import BLOCKS, MEASURES, chosen, compact, tables
from advml.similarity.cka import measure
from advml.similarity.layers import layers
from advml.similarity.probes import pooled_features

KEY = ("net", "clean")
PLAIN, CKA, POOLED = "one plain pass", "cka", "pooled features"


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of measures of similarity.")
    parser.add_argument("--quick", action="store_true", help="few images and rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count, rounds = (64, 2) if options.quick else (256, 5)
    setup = Setup.of(count=count, batch=32, seed=options.seed)
    rows = layers(setup.network, setup.batches[0][:2], select=["blocks"])
    features = pooled_features(setup.network, rows, setup.batches)
    kept = {KEY: [compact(each, chosen(count)) for each in features]}
    tasks = {
        PLAIN: setup.plain,
        CKA: lambda: measure({"net": setup.network}, {"net": rows}, ({KEY: images} for images in setup.batches)),
        POOLED: lambda: pooled_features(setup.network, rows, setup.batches),
    }
    for name, each in MEASURES.items():
        tasks[name] = lambda each=each: tables(each, kept, [(KEY, KEY)], intervals=False)
        if each.smooth:
            tasks[f"{name}, intervals"] = lambda each=each: tables(each, kept, [(KEY, KEY)])
    with threadpool_limits(options.threads):
        times = interleaved(tasks, rounds)
    print(f"## Measures of similarity\n\n{hardware_line('timm', 'scipy')}; seed {options.seed}.")
    print(
        f"Median (quartiles) of {rounds} interleaved rounds; {len(rows)} rows, {len(rows) ** 2} pairs, {count} images, {BLOCKS} blocks.\n"
    )
    print("| | domain | a pair costs | ms | with intervals, ms | over CKA's pass | over a plain pass |")
    print("|---|---|---|---|---|---|---|")
    for name in (PLAIN, CKA, POOLED, *MEASURES):
        about = (MEASURES[name].domain, MEASURES[name].cost) if name in MEASURES else ("-", "-")
        over = f"{times[name].over(times[CKA])} | {times[name].over(times[PLAIN])}"
        print(f"| {name} | {' | '.join(about)} | {times[name].milliseconds} | {_shown(times, name)} | {over} |")


def _shown(times: dict[str, Timing], name: str) -> str:
    found = times.get(f"{name}, intervals")
    return found.milliseconds if found else "-"


if __name__ == "__main__":
    main()
