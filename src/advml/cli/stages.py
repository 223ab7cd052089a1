"""One command per kind of stage of dvc.yaml. Commands import what they need: nothing heavy up here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from advml.cli.evaluate import evaluate
from advml.cli.options import PARAMS, AsJson, Overrides, Params, Phase, Regime, Scheme, Seed, context_of
from advml.cli.printing import say, say_json, show_table
from advml.core.errors import UserError
from advml.core.paths import TRANSFER_FILES, model_name, pretraining_name
from advml.recipes import REGIMES


def check(params: Params = PARAMS) -> None:
    """Validate params.yaml.

    Writes data/checked, on which all other stages depend. Next: advml prepare
    """
    from advml.pipeline.stages import check as stage

    say(str(stage.run(params)), "advml prepare")


def prepare(as_json: AsJson = False, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Turn images of any source into tensors with fixed splits.

    Writes data/prepared/ ({train,validation,test}.safetensors, dataset.json). Next: advml pretrain SL st
    """
    context = context_of(params, overrides)
    from advml.data.folder_layout import few
    from advml.pipeline.stages import prepare as stage

    dataset = stage.run(context)
    if as_json:
        from advml.core.io import read_json

        return say_json(read_json(context.workspace.prepared / "dataset.json", remedy="make it again with: advml prepare"))
    counts = ", ".join(f"{len(getattr(dataset, split).labels)} {split}" for split in ("train", "validation", "test"))
    skipped = f"; {len(dataset.skipped)} unreadable images left out" if dataset.skipped else ""
    ignored = f"; {dataset.ignored} other files left out" if dataset.ignored else ""
    print(f"{dataset.source}: {counts} images of {few(dataset.classes, shown=10)}{skipped}{ignored}")
    say(str(context.workspace.prepared), "advml pretrain SL st")


def pretrain(scheme: Scheme, phase: Phase, seed: Seed = 0, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Train an encoder with its scheme's own head, with or without an adversary.

    Writes models/pretrain/<SCHEME>-<PHASE>-s<SEED>/ and its curves in reports/. Next: advml finetune SCHEME REGIME
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import pretrain as stage

    stage.run(context, scheme=scheme, phase=phase, seed=seed)
    regimes = [name for name, regime in REGIMES.items() if regime.pretraining == phase]
    say(str(context.workspace.pretrained(pretraining_name(scheme, phase, seed))), f"advml finetune {scheme} {regimes[-1]} --seed {seed}")


def finetune(scheme: Scheme, regime: Regime, seed: Seed = 0, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Make a classifier from a pretrained encoder.

    Writes models/finetune/<SCHEME>-<REGIME>-s<SEED>/ and its curves in reports/. Next: advml evaluate SCHEME REGIME
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import finetune as stage

    stage.run(context, scheme=scheme, regime=regime, seed=seed)
    say(str(context.workspace.model(model_name(scheme, regime, seed))), f"advml evaluate {scheme} {regime} --seed {seed}")


def represent(scheme: Scheme, regime: Regime, seed: Seed = 0, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Measure how alike a model's layers are (CKA), clean and attacked, and what linear probes read from them.

    Writes reports/<MODEL>/: cka.npz, cka.json, cka.png, layers.png, metrics.json. Next: advml compare
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import represent as stage

    metrics = stage.run(context, scheme=scheme, regime=regime, seed=seed)
    name = model_name(scheme, regime, seed)
    told = {
        label: metrics.get(f"cka/{key}") for label, key in (("redundancy", "redundancy"), ("clean-adversarial CKA", "clean_adversarial"))
    }
    print(f"{name}: {'  '.join(f'{label} {value:.3f}' for label, value in told.items() if value is not None)}")
    say(f"{context.workspace.report(name)}/cka.npz, cka.json, cka.png, layers.png", "advml compare")


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models that advml has trained, by name or folder, each compared with each; none: the panels of the paper.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="reports/compare")] = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure how alike the layers of models that advml has trained are (CKA), on clean and on adversarial images.

    Writes reports/compare/: cka.npz, cka.json, clean.png, adversarial.png. Next: advml report
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import compare as stage

    out = out or context.workspace.reports / ("compare" if not models else "compare-" + "-".join(Path(model).name for model in models))
    if stage.run(context, chosen=tuple(models or ()), out=out) is None:
        return say(f"{out}/cka.json ({stage.NOTHING})", "advml train CL Full-AT")
    return say(f"{out}/cka.npz, cka.json, clean.png, adversarial.png", f"open {out}/clean.png" if models else "advml report")


def transfer(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Score the adversarial images of each model of the grid on every other model of its seed.

    Writes reports/transfer/: transfer.json, transfer.csv, transfer.png. Next: advml report
    """
    context = context_of(params, overrides)
    from advml.evaluation.records import NO_PAIRS
    from advml.pipeline.stages import transfer as stage

    blocks = stage.run(context)
    for block in blocks:
        flagged = ", ".join(flag["model"] for flag in block["flags"]) or "none"
        print(f"seed {block['seed']}: {len(block['models'])} models; flagged because of others' images: {flagged}")
    files = ", ".join(TRANSFER_FILES) if blocks else f"{TRANSFER_FILES[0]} ({NO_PAIRS})"
    say(f"{context.workspace.report('transfer')}/{files}", "advml report")


def report(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Gather all measured models into a table, test the paper's claims on them, and tell it all on one page.

    Writes reports/report.html, claims.json, summary.csv, summary.md and summary.png. Next: make ui
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import report as stage

    table = stage.run(context)
    show_table(context.config, context.workspace)
    say(
        f"{context.workspace.reports}/report.html, claims.json, summary.csv, summary.md, summary.png",
        "make ui   (compare the runs in MLflow), or: advml show " + table[-1]["model"],
    )


def stage(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="As dvc.yaml makes it, e.g. finetune_at@CL-Full-AT-0.", show_default=False)],
) -> int | None:
    """Run a stage of one model by its name in dvc.yaml.

    DVC puts the name into the environment, so that the shell does not read what params.yaml says.

    Writes what that stage writes. Next: dvc repro
    """
    return context.parent.command.main(stage_arguments(name), standalone_mode=False)


def stage_arguments(name: str) -> list[str]:
    """finetune_at@CL-Full-AT-0 -> finetune CL Full-AT --seed 0

    Raises:
        UserError: the name has no such form.
    """
    parts = re.fullmatch(
        r"([a-z]+)_(st|at)@([^-]+)-(?:(.+)-)?(\d+)", name.rpartition("dvc.yaml:")[2]
    )  # DVC adds the file of another folder
    if not parts:
        raise UserError(f"{name!r} is not the name of a model's stage, such as finetune_at@CL-Full-AT-0 or pretrain_st@SL-0")
    kind, phase, scheme, regime, seed = parts.groups()
    return [kind, scheme, regime or phase, "--seed", seed]


# In the order in which `advml --help` lists them.
COMMANDS = (check, prepare, pretrain, finetune, evaluate, represent, compare, transfer, report, stage)
