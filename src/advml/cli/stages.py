"""One command per kind of stage of dvc.yaml. Each imports what it runs, so that `advml --help` answers at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advml.cli.evaluate import evaluate
from advml.cli.options import (
    PARAMS,
    AsJson,
    OptionalRegime,
    OptionalSeed,
    Overrides,
    Params,
    Phase,
    Regime,
    Scheme,
    Seed,
    Std,
    context_of,
    mean_option,
    target_argument,
)
from advml.cli.printing import say, say_json, show_table
from advml.cli.targets import FOLDER, FUNCTION, SCHEME, TIMM, check_options, kind_of, named, of_grid
from advml.core.errors import UserError
from advml.core.paths import TRANSFER_FILES, Workspace, model_name, pretraining_name
from advml.recipes import REGIMES

if TYPE_CHECKING:
    from advml.pipeline.context import Context

Images = Annotated[Path | None, typer.Option("--images", help="Folder of photos.", show_default="the prepared test images")]
Mean = Annotated[str | None, mean_option("none; of module:function alone")]
# What there is to represent -> the options that mean something for it.
OPTIONS = {SCHEME: ("--seed",), FOLDER: ("--images",), FUNCTION: ("--images", "--mean", "--std"), TIMM: ("--images",)}


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


def represent(
    target: Annotated[str, target_argument("any network, as `compare` takes it")],
    regime: OptionalRegime = None,
    seed: OptionalSeed = None,
    images: Images = None,
    mean: Mean = None,
    std: Std = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure how alike a model's layers are (CKA), clean and attacked, and what linear probes read from them.

    Of any other network its layers on clean images, in reports/compare-MODEL/.

    Writes reports/<MODEL>/: cka.npz, cka.json, cka.png, layers.png, metrics.json. Next: advml compare
    """
    workspace = Workspace(params.parent)
    target = named(target, workspace)
    given = {"--seed": seed, "--images": images, "--mean": mean, "--std": std}
    check_options(f"represent {target}", kind_of(target, regime, workspace), OPTIONS, given)
    context = context_of(params, overrides)
    from advml.pipeline.represent_model import represent_model
    from advml.pipeline.stages import represent as stage
    from advml.pipeline.stages.compare import are_alike

    own = of_grid(target, regime, seed, workspace)
    if images or not (own or are_alike(context, [target])):
        return _any_networks(context, [target], images, mean, std, None)
    name = model_name(**own) if own else Path(target).name
    metrics = stage.run(context, **own) if own else represent_model(context, target)
    told = {
        label: metrics.get(f"cka/{key}") for label, key in (("redundancy", "redundancy"), ("clean-adversarial CKA", "clean_adversarial"))
    }
    print(f"{name}: {'  '.join(f'{label} {value:.3f}' for label, value in told.items() if value is not None)}")
    say(f"{workspace.report(name)}/cka.npz, cka.json, cka.png, layers.png", "advml compare")


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Networks, each compared with each: models that advml has trained, by name or folder, module:function, or a timm name "
            "with its weights (resnet18=FILE.safetensors); none: the panels of the paper.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="reports/compare")] = None,
    images: Images = None,
    mean: Mean = None,
    std: Std = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure how alike the layers of networks are (CKA, and `similarity.measures`), on clean and on adversarial images.

    Models that advml has trained for the prepared data are attacked, too; others, and all with --images, are compared on clean images.

    Writes reports/compare/: cka.npz, cka.json, clean.png, adversarial.png, map.png. Next: advml report
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import compare as stage

    if images or mean or std or (models and not stage.are_alike(context, models)):
        if len(models or ()) < 2:
            raise UserError("compare needs at least two networks; of one: advml represent")
        return _any_networks(context, models, images, mean, std, out)
    out = out or context.workspace.reports / _folder(models)
    if stage.run(context, chosen=tuple(models or ()), out=out) is None:
        return say(f"{out}/cka.json ({stage.NOTHING})", "advml train CL Full-AT")
    return say(f"{out}/cka.npz, cka.json, clean.png, adversarial.png, map.png", f"open {out}/clean.png" if models else "advml report")


def _folder(models: list[str] | None) -> str:
    """In reports/, of a comparison."""
    return "compare" + "".join(f"-{re.sub('[^A-Za-z0-9_.-]+', '-', Path(model.partition('=')[0]).name)}" for model in models or ())


def _any_networks(context: Context, models: list[str], images: Path | None, mean: str | None, std: str | None, out: Path | None) -> None:
    from advml.pipeline import any_networks

    out = out or context.workspace.reports / _folder(models)
    any_networks.run(context, models, images=images, mean=mean, std=std, out=out)
    say(f"{out}/cka.npz, cka.json, clean.png", f"open {out}/clean.png")


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
    """Gather all measured models into a table, test the paper's claims on them, and write a page with all figures.

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
