"""Ways of training side by side: what each costs and keeps, over seeds, all by the stages of the study.

    python benchmarks/trainings.py {cheaper,stronger,protocol,cifar10} [--seeds 0 1 2] [--folder FOLDER] [--quick]

Each way is a list of overrides of one preset; it is trained and evaluated as `advml train SCHEME REGIME` does. With --folder what was
trained stays there, and the same command goes on where it was killed; table and seeds can be extended. `cifar10` needs --images, a folder
with `train/` and `test/` of the real images (docs/results.md says which).
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timing import hardware_line

from advml import config
from advml.config.presets import preset
from advml.core.paths import Workspace, model_name
from advml.core.training_cost import cost_of
from advml.pipeline.context import Context
from advml.pipeline.stages import train
from advml.report.table import COLUMNS, Row, cell, with_means

SHOWN = ("clean", "II", "worst case", "gradient steps", "seconds")
PLAIN = ("corruptions.names=none", "tracking.experiment=trainings")
QUICK = ("data.max_train=200", "data.max_test=60", "worst_case.attacks=[apgd-ce]")
ADAMW = "optimizer: adamw, learning_rate: 0.004, weight_decay: 0.01, schedule: onecycle"


@dataclass(frozen=True)
class Way:
    """One way of training, or of evaluating what another way trains."""

    name: str
    overrides: tuple[str, ...] = ()
    models: tuple[tuple[str, str], ...] = ()  # (scheme, regime) by which it is shown; none: those of the table
    trained_as: str = ""  # name of the way whose models it evaluates


@dataclass(frozen=True)
class Table:
    """Ways of training the same models, in a workspace each."""

    models: tuple[tuple[str, str], ...]
    ways: tuple[Way, ...]
    overrides: tuple[str, ...] = ()


# Passes of an image per epoch of params.yaml under attack.steps = 5: of contrastive pretraining, of end-to-end fine-tuning. Free divides
# epochs by its replays, so that an epoch is one replay.
PASSES = {"pgd": (2 + 5 + 2, 1 + 5 + 1), "fast": (2 + 1 + 2, 1 + 1 + 1), "free": (2, 1)}
EPOCHS = (40, 10)  # of the digits study


def of_cost(kind: str, share: float, *, epochs: Sequence[int] = EPOCHS, schemes: Sequence[str] = ("CL", "SCL")) -> tuple[str, ...]:
    """The epochs of both phases that bring `kind` to `share` of the gradient steps of PGD over so many epochs."""
    pretraining, finetuning = (max(1, round(share * count * PASSES["pgd"][at] / PASSES[kind][at])) for at, count in enumerate(epochs))
    chosen = (f"attack.kind={kind}", *(f"pretrain.{scheme}.epochs={pretraining}" for scheme in schemes))
    return (*chosen, f"regimes.Full-AT.epochs={finetuning}")


CHEAPER = Table(
    models=(("CL", "AT"), ("SCL", "Full-AT")),
    ways=tuple(
        Way(f"{kind}, {wanted} of the steps", of_cost(kind, share))
        for (wanted, share), kind in itertools.product((("all", 1.0), ("a third", 1 / 3)), PASSES)
    ),
)

EMP = ("pretrain.EMP={epochs: 10, batch_size: 128, " + ADAMW + "}",)
DUAL = ("pretrain.CL.attacked=views", "model.batch_norm=dual")
LAST, AT = "pretrain.CL.keep=last", (("CL", "AT"),)
STRONGER = Table(
    models=(("CL", "AT"), ("CL", "Full-AT")),
    ways=(
        Way("SimCLR"),
        Way("SimCLR, EMA", ("pretrain.CL.average=ema",)),
        Way("SimCLR, SWA", ("pretrain.CL.average=swa",)),
        Way("ACL", DUAL),
        Way("DynACL", (*DUAL, "pretrain.CL.view_annealing=2", "pretrain.CL.weight_annealing=2", "pretrain.CL.average=ema")),
        # What ACL's collapse at this radius comes from; the last epoch, as validation attacks images, not views.
        Way("ACL, last epoch", (*DUAL, LAST), AT),
        Way("ACL, radius rising over half of the steps, last epoch", (*DUAL, LAST, "pretrain.CL.epsilon_warmup=0.5"), AT),
        Way("ACL, radius 0.075, last epoch", (*DUAL, LAST, "pretrain.CL.epsilon=0.075"), AT),
        Way("ACL, radius 0.05, last epoch", (*DUAL, LAST, "pretrain.CL.epsilon=0.05"), AT),
        Way("attacked views, one kind of batch norms, last epoch", (DUAL[0], LAST), AT),
        Way("attacked image, two kinds of batch norms, last epoch", (DUAL[1], LAST), AT),
        Way("EMP-SSL", EMP, (("EMP", "AT"), ("EMP", "Full-AT"))),
        Way("EMP-SSL, free (CF-AMC-SSL)", (*EMP, "pretrain.EMP.attack_kind=free"), (("EMP", "AT"), ("EMP", "Full-AT"))),
        Way(
            "EMP-SSL, free (CF-AMC-SSL), 40 epochs",
            (*EMP, "pretrain.EMP.attack_kind=free", "pretrain.EMP.epochs=40"),
            (("EMP", "AT"), ("EMP", "Full-AT")),
        ),
    ),
)

OVERSHOOTING, UNTIDY = ("evaluate.steps=40", "evaluate.step_size=0.0956"), ("evaluate.random_start=false", "evaluate.keep=last")
PROTOCOL = Table(
    models=(("SL", "Full-AT"), ("CL", "Full-AT")),
    ways=(
        Way("corrected"),
        Way("training attacks start at the image", ("attack.random_start=false",)),
        Way("logits of unit length", ("model.normalize_logits=true",)),
        Way("batch norms in train mode while attacked", ("attack.batch_norm=train",)),
        # Steps of 0.64 epsilon, as the paper's 0.01 is of its 4/255.
        Way("evaluation with the paper's steps", (*OVERSHOOTING, *UNTIDY), trained_as="corrected"),
        Way("the same, best iterate from a random start", OVERSHOOTING, trained_as="corrected"),
    ),
)

CROP = "{resized_crop: [0.2, 1], flip: 0.5, brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1, jitter: 0.8, grey: 0.2}"
EPOCHS_CIFAR = (10, 10)
CIFAR10 = Table(
    models=(("CL", "AT"), ("SCL", "AT")),
    ways=(
        Way("pgd"),
        Way("free, all of the steps", of_cost("free", 1.0, epochs=EPOCHS_CIFAR)),
        Way("free, a third of the steps", of_cost("free", 1 / 3, epochs=EPOCHS_CIFAR)),
        Way(
            "free (CF-AMC-SSL)",
            (*EMP, "pretrain.EMP.attack_kind=free"),
            (("EMP", "AT"),),
        ),
        Way(
            "pgd, labels of 10 %",
            ("pretrain.CLxSCL={epochs: 10, batch_size: 128, " + ADAMW + "}", "data.label_budget=0.1"),
            (("CLxSCL", "AT"),),
        ),
    ),
    overrides=(
        *("data.name=folder", "data.image_size=32", "data.max_train=3000", "data.max_test=1000", "data.validation=0.02"),
        *("model.stem=native", "threat_model.epsilon=8/255", "views.supervised={pad: 4, flip: 0.5}", f"views.contrastive={CROP}"),
        *(f"pretrain.{scheme}.epochs=10" for scheme in ("SL", "CL", "SCL")),
    ),
)
TABLES = {"cheaper": CHEAPER, "stronger": STRONGER, "protocol": PROTOCOL, "cifar10": CIFAR10}


def measure(root: Path, overrides: Sequence[str], scheme: str, regime: str, seed: int) -> Row:
    """Accuracies and cost of one model; what is trained already, with the same settings, is not trained again."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(preset("digits", overrides=list(overrides)), encoding="utf-8")
    context = Context(config.load(root / "params.yaml"), Workspace(root))
    metrics = train.run(context, scheme=scheme, regime=regime, seed=seed)
    name = model_name(scheme, regime, seed)
    return {"model": name, "scheme": scheme, "regime": regime, "seed": seed} | metrics | cost_of(context.workspace, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", choices=TABLES, default="cheaper")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, help="where what was trained stays; without it, a temporary folder")
    parser.add_argument("--images", type=Path, help="the images of cifar10")
    parser.add_argument("--quick", action="store_true", help="a few images: does it run?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    table = TABLES[arguments.table]
    fixed = (*PLAIN, *table.overrides, f"runtime.device={arguments.device}", f"runtime.threads={arguments.threads}")
    fixed += (f"data.path={arguments.images.resolve()}",) if arguments.images else ()
    print(f"{hardware_line()}; seeds {arguments.seeds}\n")
    print(f"| model | training | {' | '.join(SHOWN)} |\n|---|---|{'---:|' * len(SHOWN)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for way in table.ways:
            root = folder / arguments.table / re.sub(r"\W+", "-", way.trained_as or way.name)
            for scheme, regime in way.models or table.models:
                quick = (*QUICK, f"pretrain.{scheme}.epochs=1") if arguments.quick else ()
                rows = [measure(root, (*fixed, *way.overrides, *quick), scheme, regime, seed) for seed in arguments.seeds]
                row = with_means(rows)[0]
                print(f"| {scheme}-{regime} | {way.name} | {' | '.join(cell(row, COLUMNS[name]) for name in SHOWN)} |", flush=True)


if __name__ == "__main__":
    main()
