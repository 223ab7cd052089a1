"""What the worst case costs: the cascade, against the same attacks one after another on the full batch.

    python benchmarks/worst_case.py [--quick] [--threads 1] [--rounds 1] [--seed 0]

Two supervised networks of the digits study are trained here, one in the standard way (ST) and one adversarially (AT). The cascade
aims every attack at what all before it have left standing; the peer aims every attack, restarts included, at all test images and
keeps what survives all. Same attacks, same settings, same library, same network; an image draws the same random numbers in both, so
that verdicts can differ by rounding only. Attacks at AutoAttack's standard strength, or with --quick at a tenth of it. The floor is
what PGD on cross-entropy alone takes.

Both networks are attacked twice, for the library's attacks too drop what they have broken, target by target: what the cascade saves
depends on how many images survive. At the digits study's epsilon a few images of the standard network survive everything, and those few
take cascade and peer through all of it; at twice that epsilon nothing survives, as at 8/255 on natural images. Of the adversarially
trained network three images in four survive at the study's epsilon, and three in ten at four thirds of it, nearer to what such networks
keep on natural images. The targets are about the cases that are like natural images.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from timing import Timing, hardware_line, interleaved
from torch import Tensor, nn

from advml import config
from advml.data import datasets
from advml.data.datasets import Dataset, Split
from advml.evaluation.accuracy import survivors
from advml.evaluation.measure import Effort, measure
from advml.evaluation.plan import Figure, plan
from advml.presets import preset
from advml.runtime.checkpoint import Checkpoint
from advml.runtime.machine import Machine
from advml.training.phases import fit_phase

# phase of SL's pretraining, epsilon as a multiple of the study's, most of the peer's time that is wanted
CASES = (("ST", 2.0, 0.05), ("ST", 1.0, None), ("AT", 4 / 3, 0.8), ("AT", 1.0, None))
STANDARD = ("worst_case.restarts=5", "worst_case.steps=100", "worst_case.targets=9", "worst_case.queries=5000")
QUICK = ("worst_case.restarts=2", "worst_case.steps=10", "worst_case.targets=9", "worst_case.queries=500")


def trained(configuration: config.Config, dataset: Dataset, machine: Machine, phase: str, seed: int) -> nn.Module:
    """The supervised network of the digits study."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(Path(folder) / "state", "benchmark")
        network, _ = fit_phase(configuration, dataset, machine, kind="pretrain", scheme="SL", which=phase, seed=seed, checkpoint=checkpoint)
    return network.to(memory_format=torch.channels_last).eval()


def one_after_another(network: nn.Module, split: Split, figures: list[Figure], effort: Effort) -> Tensor:
    """Which images survive: every attack on all of them."""
    alone = [replace(figure, left_only=False, coupled=True, kept=False) for figure in figures]  # coupled: no image leaves the batch
    return survivors(measure(network, split, alone, effort))


def compare(
    network: nn.Module, split: Split, figures: list[Figure], effort: Effort, rounds: int
) -> tuple[dict[str, Timing], dict[str, Tensor]]:
    """Times and verdicts of the cascade, of its peer and of the floor."""
    verdicts: dict[str, Tensor] = {}
    tasks = {
        "cascade": lambda: verdicts.update(cascade=survivors(measure(network, split, figures, effort))),
        "one after another": lambda: verdicts.update(peer=one_after_another(network, split, figures, effort)),
        "PGD-CE alone": lambda: measure(network, split, figures[:2], effort),
    }
    return interleaved(tasks, rounds, warm_up=0), verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    overrides = [*(QUICK if options.quick else STANDARD), "runtime.device=cpu"]
    configuration = config.validate(config.apply(preset("digits"), overrides))
    dataset, machine = datasets.prepare(configuration.data), Machine(torch.device("cpu"))
    effort = Effort(configuration.evaluate.batch_size, options.seed, machine)
    print(f"worst case of {len(dataset.test)} digits; {hardware_line('pyautoattack')}; seed {options.seed}")
    networks = {phase: trained(configuration, dataset, machine, phase.lower(), options.seed) for phase in ("ST", "AT")}
    for phase, multiple, wanted in CASES:
        attacked = config.validate(
            config.apply(preset("digits"), [*overrides, f"evaluate.epsilon={multiple * configuration.threat_model.epsilon}"])
        )
        figures = [figure for figure in plan(attacked, None, classes=len(dataset.classes)) if not figure.name.endswith("_half")]
        times, verdicts = compare(networks[phase], dataset.test, figures, effort, options.rounds)
        ratio, floor = (times[key].over(times["one after another"]) for key in ("cascade", "PGD-CE alone"))
        same = int((verdicts["cascade"] == verdicts["peer"]).sum())
        target = "no target" if wanted is None else f"wanted: at most {wanted}"
        print(
            f"{phase}, epsilon {attacked.attacked_epsilon:g}: cascade {times['cascade'].show()} s, one after another "
            f"{times['one after another'].show()} s: {ratio} of it "
            f"({target}; PGD-CE alone {floor}); worst case "
            f"{100 * float(verdicts['cascade'].float().mean()):.1f} % and {100 * float(verdicts['peer'].float().mean()):.1f} %, "
            f"same verdict on {same} of {len(dataset.test)} images"
        )


if __name__ == "__main__":
    main()
