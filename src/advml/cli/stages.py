"""Commands of the pipeline's stages. Each imports what it runs, so that `advml --help` answers at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advml.cli.options import (
    PARAMS,
    AsJson,
    OptionalRegime,
    OptionalSeed,
    Overrides,
    Params,
    Phase,
    Processes,
    Regime,
    Scheme,
    Seed,
    Std,
    context_of,
    mean_option,
    start,
    target_argument,
)
from advml.cli.printing import percent, say, say_json, show_table
from advml.core.errors import UserError
from advml.core.messages import tell
from advml.core.paths import TRANSFER_FILES, Workspace, canonical, model_name, pretraining_name
from advml.recipes import REGIMES, SCHEMES

if TYPE_CHECKING:
    from advml.pipeline.context import Context

Images = Annotated[Path | None, typer.Option("--images", help="Folder of images to use.", show_default="the prepared test images")]
Mean = Annotated[str | None, mean_option("none; only for module:function")]
# Kinds of target of `evaluate` and `represent`
SCHEME, FOLDER, FUNCTION, TIMM = "a scheme with a regime", "a trained model, by folder or name", "module:function", "a timm name"
# Kind of target -> options that it accepts, of `evaluate` and of `represent`.
OF_EVALUATE = {
    SCHEME: ("--seed", "--name"),
    FOLDER: ("--classes", "--name"),
    FUNCTION: ("--mean", "--std", "--classes", "--name"),
    TIMM: ("--weights", "--mean", "--std", "--classes", "--name"),
}
OF_REPRESENT = {SCHEME: ("--seed",), FOLDER: ("--images",), FUNCTION: ("--images", "--mean", "--std"), TIMM: ("--images",)}


def check(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Validate params.yaml; with -S, params.yaml as it would be with these values.

    Writes data/checked, which all other stages depend on, unless there are overrides. Next: advml prepare
    """
    from advml.pipeline.stages import check as stage

    written = stage.run(params, overrides or ())
    say(str(written) if written else "nothing: with -S, values are only checked", "advml prepare")


def prepare(as_json: AsJson = False, overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Convert the dataset to tensors with fixed splits.

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


def pretrain(
    scheme: Scheme, phase: Phase, seed: Seed = 0, processes: Processes = 1, overrides: Overrides = None, params: Params = PARAMS
) -> None:
    """Train an encoder with the head of its scheme, on clean images (st) or under attack (at).

    Writes models/pretrain/<SCHEME>-<PHASE>-s<SEED>/ and training curves in reports/. Next: advml finetune SCHEME REGIME
    """
    start(processes)
    context = context_of(params, overrides)
    from advml.pipeline.stages import pretrain as stage

    stage.run(context, scheme=scheme, phase=phase, seed=seed)
    regimes = [name for name, regime in REGIMES.items() if regime.pretraining == phase]
    say(str(context.workspace.pretrained(pretraining_name(scheme, phase, seed))), f"advml finetune {scheme} {regimes[-1]} --seed {seed}")


def finetune(
    scheme: Scheme, regime: Regime, seed: Seed = 0, processes: Processes = 1, overrides: Overrides = None, params: Params = PARAMS
) -> None:
    """Train a classifier on a pretrained encoder.

    Writes models/finetune/<SCHEME>-<REGIME>-s<SEED>/ and training curves in reports/. Next: advml evaluate SCHEME REGIME
    """
    start(processes)
    context = context_of(params, overrides)
    from advml.pipeline.stages import finetune as stage

    stage.run(context, scheme=scheme, regime=regime, seed=seed)
    say(str(context.workspace.model(model_name(scheme, regime, seed))), f"advml evaluate {scheme} {regime} --seed {seed}")


def evaluate(
    target: Annotated[str, target_argument("a model: the name or folder of one with model.json, a timm name, or module:function")],
    regime: OptionalRegime = None,
    seed: OptionalSeed = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of a timm model: a safetensors file with timm's own names.")] = None,
    mean: Annotated[
        str | None,
        mean_option("none; for a timm model: timm", more=", data (of the training images), timm (published for a timm model)"),
    ] = None,
    std: Std = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Class names of the model's logits, in order: a,b,c, a file with one per line, or natural (numeric order: 1, 2, 10).",
            show_default="the order of the data's classes",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name for the reports of this model; lets a model of the study be evaluated again beside its own results."),
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure clean, robust and worst-case accuracy on the test split.

    Writes reports/<MODEL>/metrics.json and samples.parquet, and the attacks' settings into records/evaluate/<MODEL>.json.
    Next: advml show MODEL
    """
    workspace = Workspace(params.parent)
    target = named(target, workspace, imported=weights is None)
    given = {"--seed": seed, "--weights": weights, "--mean": mean, "--std": std, "--classes": classes, "--name": name}
    check_options(f"evaluate {target}", kind_of(target, regime, workspace), OF_EVALUATE, given)
    context = context_of(params, overrides)
    from advml.pipeline.stages import evaluate as stage

    own = of_grid(target, regime, seed, workspace)
    if own and not name:
        if classes is not None:
            raise UserError(f"evaluate {target}: --classes has no meaning for a model of this study, whose classes are known; leave it out")
        model = model_name(**own)
        return tell_result(model, stage.run(context, **own), str(context.workspace.report(model)), context, as_json=as_json)
    from advml.models.external import LoadOptions, load

    target = str(stage.trained(context.workspace, model_name(**own))) if own else target
    options = LoadOptions(weights, mean, std, classes)
    given = load(target, options, spec=context.config.model, dataset=context.dataset, device=context.machine.device)
    given = replace(given, name=name) if name else given
    for remark in given.remarks:
        tell(f"note: {remark}")
    metrics = stage.run_given(context, given)
    written = f"{workspace.report(given.name)}/metrics.json, samples.parquet, {workspace.record('evaluate', given.name)}"
    return tell_result(given.name, metrics, written, context, as_json=as_json)


def tell_result(model: str, metrics: dict[str, float], written: str, context: Context, *, as_json: bool) -> None:
    """Print a model's metrics and flags, as text or as JSON."""
    from advml.core.io import read_json
    from advml.report.show import flags_of

    made = context.workspace.record("evaluate", model)
    record = read_json(made, remedy="measure again with: advml evaluate")
    if as_json:
        return say_json({"model": model, "metrics": metrics, "flags": record["diagnostics"]["flags"], "record": str(made)})
    print(f"{model}: {percent(metrics)}", *flags_of(record), sep="\n")
    return say(written, f"advml show {model}")


def represent(
    target: Annotated[str, target_argument("any network, in the notation of `advml compare`")],
    regime: OptionalRegime = None,
    seed: OptionalSeed = None,
    images: Images = None,
    mean: Mean = None,
    std: Std = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure the similarity of a model's layers (CKA) on clean and adversarial images, and the accuracy of linear probes on them.

    For networks that advml has neither trained nor imported, only CKA on clean images is written, to reports/compare-MODEL/.

    Writes reports/<MODEL>/: cka.npz, cka.json, cka.png, layers.png, metrics.json. Next: advml compare
    """
    workspace = Workspace(params.parent)
    target = named(target, workspace)
    given = {"--seed": seed, "--images": images, "--mean": mean, "--std": std}
    check_options(f"represent {target}", kind_of(target, regime, workspace), OF_REPRESENT, given)
    context = context_of(params, overrides)
    from advml.pipeline.any_networks import represent_model
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
            help="Two or more networks, compared pairwise: models trained by advml (name or folder), module:function, or a timm name with "
            "weights (resnet18=FILE.safetensors). Without any: the pairs of the paper.",
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
    """Measure the similarity of layers of different networks (CKA, and `similarity.measures`), on clean and adversarial images.

    Only models that advml has trained on the prepared data are compared on adversarial images, and only without --images.

    Writes reports/compare/: cka.npz, cka.json, clean.png, adversarial.png, map.png. Next: advml report
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import compare as stage

    if images or mean or std or (models and not stage.are_alike(context, models)):
        if len(models or ()) < 2:
            raise UserError("compare needs at least two networks; for the layers of one, use: advml represent")
        return _any_networks(context, models, images, mean, std, out)
    out = out or context.workspace.reports / _folder(models)
    if stage.run(context, chosen=tuple(models or ()), out=out) is None:
        return say(f"{out}/cka.json ({stage.NOTHING})", "advml train CL Full-AT")
    return say(f"{out}/cka.npz, cka.json, clean.png, adversarial.png, map.png", f"open {out}/clean.png" if models else "advml report")


def _folder(models: list[str] | None) -> str:
    """Name of a comparison's folder in reports/."""
    return "compare" + "".join(f"-{re.sub('[^A-Za-z0-9_.-]+', '-', Path(model.partition('=')[0]).name)}" for model in models or ())


def _any_networks(context: Context, models: list[str], images: Path | None, mean: str | None, std: str | None, out: Path | None) -> None:
    from advml.pipeline import any_networks

    out = out or context.workspace.reports / _folder(models)
    any_networks.run(context, models, images=images, mean=mean, std=std, out=out)
    say(f"{out}/cka.npz, cka.json, clean.png", f"open {out}/clean.png")


def transfer(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Measure transfer: accuracy of each model on the adversarial images of every other model of the same seed.

    Writes reports/transfer/: transfer.json, transfer.csv, transfer.png. Next: advml report
    """
    context = context_of(params, overrides)
    from advml.evaluation.records import NO_PAIRS
    from advml.pipeline.stages import transfer as stage

    blocks = stage.run(context)
    for block in blocks:
        flagged = ", ".join(flag["model"] for flag in block["flags"]) or "none"
        print(f"seed {block['seed']}: {len(block['models'])} models; flagged, because images of other models break them: {flagged}")
    files = ", ".join(TRANSFER_FILES) if blocks else f"{TRANSFER_FILES[0]} ({NO_PAIRS})"
    say(f"{context.workspace.report('transfer')}/{files}", "advml report")


def report(overrides: Overrides = None, params: Params = PARAMS) -> None:
    """Write the study's table, tests of the paper's claims, and a page with all figures.

    Writes reports/report.html, claims.json, summary.csv, summary.md and summary.png. Next: advml ui
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import report as stage

    table = stage.run(context)
    show_table(context.config, context.workspace)
    say(
        f"{context.workspace.reports}/report.html, claims.json, summary.csv, summary.md, summary.png",
        "advml ui   (compare the runs in MLflow), or: advml show " + table[-1]["model"],
    )


def stage(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the stage in dvc.yaml, e.g. finetune_at@CL-Full-AT-0.", show_default=False)],
) -> int | None:
    """Run one model's stage by its name in dvc.yaml.

    For dvc.yaml, which passes the name as "$DVC_STAGE", so that the shell never interprets text from params.yaml.

    Writes the files of that stage. Next: dvc repro
    """
    return context.parent.command.main(stage_arguments(name), standalone_mode=False)


def stage_arguments(name: str) -> list[str]:
    """Arguments of a stage's command: finetune_at@CL-Full-AT-0 -> finetune CL Full-AT --seed 0.

    Raises:
        UserError: the name does not have this form.
    """
    name_alone = name.rpartition("dvc.yaml:")[2]  # in another folder, DVC puts the path of dvc.yaml before the name
    parts = re.fullmatch(r"([a-z]+)_(st|at)@([^-]+)-(?:(.+)-)?(\d+)", name_alone)
    if not parts:
        raise UserError(f"{name!r} is not the name of a model's stage, such as finetune_at@CL-Full-AT-0 or pretrain_st@SL-0")
    kind, phase, scheme, regime, seed = parts.groups()
    return [kind, scheme, regime or phase, "--seed", seed]


# Interpretation of the target of `evaluate` and `represent`: a scheme with a regime, or another model


def named(target: str, workspace: Workspace, *, imported: bool = True) -> str:
    """Complete a target: `cl` -> `CL`, `cl-at` -> `CL-AT-s0` if it exists, an imported model's name -> its folder; else unchanged."""
    if (workspace.model(canonical(target)) / "model.json").is_file() and not Path(target).exists():
        return canonical(target)
    if imported and (workspace.imported(target) / "model.json").is_file():
        return str(workspace.imported(target))
    return {name.lower(): name for name in SCHEMES}.get(target.lower(), target)


def kind_of(target: str, regime: str | None, workspace: Workspace) -> str:
    """Kind of a target: SCHEME, FOLDER, FUNCTION or TIMM.

    Raises:
        UserError: a scheme is given without a regime, or a regime without a scheme.
    """
    if regime is None and target in SCHEMES:
        raise UserError(f"{target}: a scheme needs a regime; choose from {', '.join(REGIMES)}")
    if regime is not None and target not in SCHEMES:
        raise UserError(f"{target} {regime}: a regime can only follow a scheme ({', '.join(SCHEMES)}); leave out {regime}")
    if regime:
        return SCHEME
    if any((folder / "model.json").is_file() for folder in (Path(target), workspace.model(target))):
        return FOLDER
    return FUNCTION if ":" in target else TIMM


def check_options(command: str, kind: str, options: Mapping[str, Sequence[str]], given: Mapping[str, Any]) -> None:
    """Raise UserError for an option that is given (not None) but not listed in `options` for this kind of target."""
    for option, value in given.items():
        if value is not None and option not in options[kind]:
            raise UserError(f"{command}: {option} has no meaning for {kind}, which takes {', '.join(options[kind])}; leave it out")


def of_grid(target: str, regime: str | None, seed: int | None, workspace: Workspace) -> dict[str, Any] | None:
    """Scheme, regime and seed of a model of this study, given by these, by its name or by its folder; None for other models."""
    from advml.pipeline.stages.evaluate import of_study

    return {"scheme": target, "regime": regime, "seed": seed or 0} if regime else of_study(workspace, target)


COMMANDS = (check, prepare, pretrain, finetune, evaluate, represent, compare, transfer, report, stage)
