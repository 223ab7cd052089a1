"""Training steps with a compiled encoder (`runtime.compile`) beside the same ones without.

    python benchmarks/compiled.py [--quick] [--device cpu] [--threads 1] [--seed 0] [--batch 64] [--steps 2] [--rounds 3]

Steps are the trainer's own, by the plans of `advml preset cifar10` (ResNet-18, 3 x 32 x 32, PGD of 5 steps) on random images. The first
step of each run, in which the encoder is compiled, does not count.
"""

from __future__ import annotations

from functools import partial

from gpu import train
from step import study
from timing import Timing, hardware_line, options

from advml import config
from advml.core import device

KINDS = ("plain", "compiled")
PHASES = ("ST", "AT")


def main() -> None:
    parser = options("Training steps with a compiled encoder.", quick="a tiny network and batch, one round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tiny = ["model.backbone=test_resnet", "attack.steps=1"] if arguments.quick else []
    batch, rounds = (8, 1) if arguments.quick else (arguments.batch, arguments.rounds)
    chosen, dataset = study(batch, images=batch * (arguments.steps + 2), seed=arguments.seed, overrides=tuple(tiny))
    about = {"device": str(arguments.device), "threads": arguments.threads}
    machines = {kind: device.machine(config.Runtime(**about, compile=kind == "compiled")) for kind in KINDS}
    print(
        f"## A compiled encoder\n\n{hardware_line('timm')}; device {arguments.device}; seed {arguments.seed}. Batches of {batch} images.\n"
    )
    print("| step | plain, milliseconds | compiled, milliseconds | compiled / plain |\n|---|---|---|---|")
    for phase in PHASES:
        run = partial(train, chosen, dataset, phase=phase, seed=arguments.seed, steps=arguments.steps)
        samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            for kind in KINDS[:: 1 if number % 2 == 0 else -1]:
                samples[kind].append(run(machine=machines[kind]))
        plain, compiled = (Timing.of(samples[kind]) for kind in KINDS)
        print(f"| {phase} | {plain.milliseconds} | {compiled.milliseconds} | {compiled.over(plain)} |", flush=True)


if __name__ == "__main__":
    main()
