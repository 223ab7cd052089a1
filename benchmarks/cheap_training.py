"""What cheaper adversarial training costs and keeps, on digits: PGD against free and fast, at equal gradient steps and at a third.

    python benchmarks/cheap_training.py [--quick] [--epochs 12] [--seed 0]

Trains CL-AT and SCL-Full-AT as the digits study does, in a temporary folder, with fewer epochs; every variant under the same protocol of
evaluation. A variant's epochs are chosen so that its gradient steps (views and steps of the attack that pass the encoder forwards and
backwards, per training image) come near the asked share of those of PGD-5; what they came to is measured, and printed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from timing import hardware_line

from advml import config
from advml.config.presets import preset
from advml.core.paths import Workspace, model_name
from advml.core.training_cost import SECONDS, STEPS, cost_of
from advml.pipeline.context import Context
from advml.pipeline.stages import train

MODELS = (("CL", "AT"), ("SCL", "Full-AT"))
# Passes of an image per epoch of params.yaml under attack.steps = 5: of contrastive pretraining, of end-to-end fine-tuning. Free divides
# epochs by its replays, so that an epoch is one replay.
PASSES = {"pgd": (2 + 5 + 2, 1 + 5 + 1), "fast": (2 + 1 + 2, 1 + 1 + 1), "free": (2, 1)}
COLUMNS = ("clean", "threat_model_2", "worst_case")


def overrides(kind: str, share: float, scheme: str, regime: str, *, epochs: int) -> list[str]:
    """The epochs of both phases that bring `kind` to `share` of the gradient steps of PGD over so many epochs."""
    both = enumerate((epochs, epochs // 4))
    pretraining, finetuning = (round(share * count * PASSES["pgd"][at] / PASSES[kind][at]) for at, count in both)
    chosen = [f"attack.kind={kind}", f"pretrain.{scheme}.epochs={max(1, pretraining)}"]
    return chosen + ([f"regimes.{regime}.epochs={max(1, finetuning)}"] if regime == "Full-AT" else [])


def measure(root: Path, values: list[str], scheme: str, regime: str, seed: int) -> dict[str, float]:
    """Accuracies and cost of one model, trained and evaluated in a study of its own."""
    root.mkdir()
    (root / "params.yaml").write_text(preset("digits", overrides=values), encoding="utf-8")
    context = Context(config.load(root / "params.yaml"), Workspace(root))
    metrics = train.run(context, scheme=scheme, regime=regime, seed=seed)
    return metrics | cost_of(context.workspace, model_name(scheme, regime, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one epoch of PGD, a few images")
    parser.add_argument("--epochs", type=int, default=12, help="of PGD's pretraining; fine-tuning takes a quarter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    epochs = 1 if arguments.quick else arguments.epochs
    fixed = ["corruptions.names=none", "diagnostics.images=0", "tracking.experiment=benchmark", f"seeds=[{arguments.seed}]"]
    fixed += [f"runtime.device={arguments.device}", f"runtime.threads={arguments.threads}"]
    fixed += ["data.max_train=200", "data.max_test=60", "worst_case.attacks=[apgd-ce]"] if arguments.quick else []
    print(f"{hardware_line()}; epochs {epochs}, seed {arguments.seed}\n")
    print("| model | training | share of PGD's steps | gradient steps | seconds | clean | PGD-20 | worst case |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for scheme, regime in MODELS:
            for kind, share in (("pgd", 1.0), ("pgd", 1 / 3), ("free", 1.0), ("free", 1 / 3), ("fast", 1.0), ("fast", 1 / 3)):
                values = fixed + overrides(kind, share, scheme, regime, epochs=epochs)
                found = measure(Path(folder) / f"{scheme}-{kind}-{share:.2f}", values, scheme, regime, arguments.seed)
                figures = " | ".join(f"{100 * found[f'accuracy/{name}']:.1f}" for name in COLUMNS)
                steps, seconds = found[STEPS], found[SECONDS]
                print(f"| {scheme}-{regime} | {kind} | {share:.2f} | {steps:,.0f} | {seconds:.0f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
