"""What the worst case costs: the cascade, against the same attacks one after another on the full batch.

    python benchmarks/worst_case.py [CL-ST CL-AT SL-AT@0.2 ...] [--quick] [--threads 1] [--rounds 1] [--seed 0]

Networks of the digits study are trained here, of any scheme and regime, and attacked at the study's epsilon or at the one behind the @.
The cascade aims every attack at what all before it have left standing; the peer aims every attack, restarts included, at all test images
and keeps what survives all. Same attacks, same settings, same library, same network; an image draws the same random numbers in both, so
that verdicts can differ by rounding only. Threat model I, whose objective couples the images, is not among the attacks. These have
AutoAttack's standard strength (ten minutes in all), or with --quick a tenth of its steps and queries. The floor is what PGD on
cross-entropy alone takes.

The library's attacks, too, drop what they have broken, target by target, so that what the cascade saves depends on how many images
survive: under ST none, under AT half of them or a third, as of natural images. SL-AT at the study's epsilon keeps three in four, and SL-ST
a handful, which take cascade and peer through all of it in small batches; they have no target.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from timing import Timing, hardware_line, interleaved
from torch import Tensor, nn

from advml import config
from advml.config.presets import preset
from advml.core.device import Machine
from advml.data import datasets
from advml.data.datasets import Dataset
from advml.evaluation.attack_suite import AttackSpec, attack_suite
from advml.evaluation.metrics import survivors
from advml.evaluation.run_attacks import Scorer, run_attacks
from advml.evaluation.samples import Outcome
from advml.pipeline.plans import finetuning, pretraining
from advml.recipes import REGIMES, SCHEMES
from advml.training.checkpoint import Checkpoint
from advml.training.trainer import fit

WANTED = {"CL-ST": 0.05, "CL-AT": 0.8, "SL-AT@0.2": 0.8}  # at most so much of the peer's time
STANDARD = ("worst_case.restarts=5", "worst_case.steps=100", "worst_case.targets=9", "worst_case.queries=5000")
QUICK = ("worst_case.restarts=2", "worst_case.steps=10", "worst_case.targets=9", "worst_case.queries=500")

Run = Callable[[list[AttackSpec]], dict[str, Outcome]]


def trained(configuration: config.Config, dataset: Dataset, machine: Machine, scheme: str, regime: str, seed: int) -> nn.Module:
    """The network of the digits study."""
    with tempfile.TemporaryDirectory() as folder:
        plan = pretraining(configuration, dataset, scheme=scheme, phase=REGIMES[regime].pretraining, seed=seed)
        network, _ = fit(plan, dataset, machine, checkpoint=Checkpoint(Path(folder) / "pretrain", "benchmark"))
        plan = finetuning(configuration, dataset, machine, network, scheme=scheme, regime=regime, seed=seed)
        return fit(plan, dataset, machine, checkpoint=Checkpoint(Path(folder) / "finetune", "benchmark"))[0].eval()


def one_after_another(run: Run, figures: list[AttackSpec]) -> Tensor:
    """Which images survive: every attack on all of them."""
    alone = [replace(figure, left_only=False, coupled=True, kept=False) for figure in figures]  # coupled: no image leaves the batch
    return survivors(run(alone))


def compare(run: Run, figures: list[AttackSpec], rounds: int) -> tuple[dict[str, Timing], dict[str, Tensor]]:
    """Times and verdicts of the cascade, of its peer and of the floor."""
    verdicts: dict[str, Tensor] = {}
    tasks = {
        "cascade": lambda: verdicts.update(cascade=survivors(run(figures))),
        "one after another": lambda: verdicts.update(peer=one_after_another(run, figures)),
        "PGD-CE alone": lambda: run(figures[:2]),
    }
    return interleaved(tasks, rounds, warm_up=0), verdicts


def case(parser: argparse.ArgumentParser, model: str) -> tuple[str, str, list[str]]:
    """`SL-AT@0.2`: scheme, regime, and the overrides of the configuration that attacks it."""
    name, _, epsilon = model.partition("@")
    scheme, _, regime = name.partition("-")
    if scheme not in SCHEMES or regime not in REGIMES:
        parser.error(f"there is no model {name}; a model is one of {', '.join(SCHEMES)}, a dash, and one of {', '.join(REGIMES)}")
    return scheme, regime, [f"evaluate.epsilon={epsilon}"] if epsilon else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(WANTED), help="SCHEME-REGIME, or SCHEME-REGIME@EPSILON")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cases = {model: case(parser, model) for model in options.models}
    torch.set_num_threads(options.threads)
    settings = [*(QUICK if options.quick else STANDARD), "runtime.device=cpu"]
    configuration = config.validate(config.apply(preset("digits"), settings))
    dataset, machine = datasets.prepare(configuration.data), Machine(torch.device("cpu"))
    print(f"worst case of {len(dataset.test)} digits; {hardware_line('pyautoattack')}; seed {options.seed}")
    for model, (scheme, regime, overrides) in cases.items():
        network = trained(configuration, dataset, machine, scheme, regime, options.seed)
        attacked = config.validate(config.apply(preset("digits"), [*settings, *overrides]))
        spec, about = attacked.evaluate, {"temperature": attacked.temperature, "classes": len(dataset.classes)}
        suite = attack_suite(spec, attacked.threat_model, attacked.worst_case, None, **about)
        figures = [attack for attack in suite if not attack.name.endswith("_half")]
        how = {"batch_size": spec.batch_size, "seed": options.seed}
        run = partial(run_attacks, network, Scorer.of(network, machine), dataset.test, **how)
        times, verdicts = compare(run, figures, options.rounds)
        ratio, floor = (times[key].over(times["one after another"]) for key in ("cascade", "PGD-CE alone"))
        same = int((verdicts["cascade"] == verdicts["peer"]).sum())
        target = f"wanted: at most {WANTED[model]}" if model in WANTED else "no target"
        print(
            f"{model}, epsilon {attacked.attacked_epsilon:g}: cascade {times['cascade'].show()} s, one after another "
            f"{times['one after another'].show()} s: {ratio} of it "
            f"({target}; PGD-CE alone {floor}); worst case "
            f"{100 * float(verdicts['cascade'].float().mean()):.1f} % and {100 * float(verdicts['peer'].float().mean()):.1f} %, "
            f"same verdict on {same} of {len(dataset.test)} images",
            flush=True,
        )


if __name__ == "__main__":
    main()
