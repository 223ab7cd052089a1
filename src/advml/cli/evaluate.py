"""The command `evaluate`, for models of the study and from elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from advml.cli.options import PARAMS, AsJson, Overrides, Params, choice, context_of
from advml.cli.printing import percent, say, say_json, show_flags
from advml.core.errors import UserError
from advml.core.messages import tell
from advml.core.paths import Workspace, canonical, model_name
from advml.recipes import RegimeName, SchemeName

if TYPE_CHECKING:
    from advml.pipeline.context import Context

# What there is to evaluate -> the options that mean something for it.
OPTIONS = {
    "a scheme with a regime": ("--seed", "--name"),
    "a trained model, by folder or name": ("--classes", "--name"),
    "module:function": ("--mean", "--std", "--classes", "--name"),
    "a timm name": ("--weights", "--mean", "--std", "--classes", "--name"),
}
SCHEME, FOLDER, FUNCTION, TIMM = OPTIONS


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SCHEME|MODEL",
            help="SL, CL or SCL, with a regime. Or a model from elsewhere: a folder with model.json, a timm name, or module:function.",
            show_default=False,
        ),
    ],
    regime: Annotated[str | None, choice(RegimeName, "Regime of the scheme's model.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the scheme's model.", show_default="0")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of a timm model: a safetensors file with timm's own names.")] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Mean of the normalisation that the model expects: one number or one per channel, or a name for mean and std: imagenet, "
            "cifar10, cifar100, clip, half (-1 to 1), mnist, levels (0 to 255), data (of the training images), none, of a timm model timm.",
            show_default="none; timm of a timm model",
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(help="Standard deviation, given in the same ways.", show_default="of the name that --mean gives"),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Names of the model's logits, in their order: a,b,c, a file with one per line, or natural (1, 2, 10).",
            show_default="the order of the data's classes",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name for the files of a model from elsewhere, or to measure one of the study anew beside it.")
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure clean, robust and worst-case accuracy on the test split.

    Writes reports/<MODEL>/metrics.json and samples.parquet; how they were made stands in records/evaluate/<MODEL>.json.
    Next: advml show MODEL
    """
    target = _named(target, Workspace(params.parent))
    kind = _kind(target, regime, Workspace(params.parent))
    given = {"--seed": seed, "--weights": weights, "--mean": mean, "--std": std, "--classes": classes, "--name": name}
    for option in (option for option, value in given.items() if value is not None and option not in OPTIONS[kind]):
        raise UserError(f"evaluate {target}: {option} has no meaning for {kind}, which takes {', '.join(OPTIONS[kind])}; leave it out")
    context = context_of(params, overrides)
    from advml.pipeline.stages import evaluate as stage

    own = {"scheme": target, "regime": regime, "seed": seed or 0} if regime else stage.of_study(context.workspace, target)
    wishes = {"weights": weights, "mean": mean, "std": std, "classes": classes}
    if own is None:
        return _evaluate_given(target, wishes, name, context, as_json=as_json)
    model = model_name(**own)
    if name:
        return _evaluate_given(str(stage.trained(context.workspace, model)), wishes, name, context, as_json=as_json)
    if classes is not None:
        raise UserError(f"evaluate {target}: --classes has no meaning for a model of this study, whose classes are known; leave it out")
    tell_result(model, stage.run(context, **own), str(context.workspace.report(model)), context, as_json=as_json)


def tell_result(model: str, metrics: dict[str, float], written: str, context: Context, *, as_json: bool) -> None:
    """Print a model's metrics and flags, for people or as JSON."""
    made = context.workspace.record("evaluate", model)
    if as_json:
        from advml.core.io import read_json

        flags = read_json(made, remedy="measure again with: advml evaluate")["diagnostics"]["flags"]
        return say_json({"model": model, "metrics": metrics, "flags": flags, "record": str(made)})
    print(f"{model}: {percent(metrics)}")
    show_flags(made)
    say(written, f"advml show {model}")


def _named(target: str, workspace: Workspace) -> str:
    """`cl` -> `CL`, `cl-at` -> `CL-AT-s0` where there is such a model; anything else stays as it is."""
    schemes = {name.lower(): name for name in get_args(SchemeName)}
    if (workspace.model(canonical(target)) / "model.json").is_file() and not Path(target).exists():
        return canonical(target)
    return schemes.get(target.lower(), target)


def _kind(target: str, regime: str | None, workspace: Workspace) -> str:
    """The key of OPTIONS."""
    if regime is None and target in get_args(SchemeName):
        raise UserError(f"evaluate {target}: which regime? Choose from {', '.join(get_args(RegimeName))}")
    if regime is not None and target not in get_args(SchemeName):
        raise UserError(f"evaluate {target} {regime}: a regime goes with {', '.join(get_args(SchemeName))}; leave out {regime}")
    if regime:
        return SCHEME
    if any((folder / "model.json").is_file() for folder in (Path(target), workspace.model(target))):
        return FOLDER
    return FUNCTION if ":" in target else TIMM


def _evaluate_given(target: str, wishes: dict[str, Any], name: str | None, context: Context, *, as_json: bool) -> None:
    from advml.models.external import Wishes, load
    from advml.pipeline.stages import evaluate as stage

    given = load(target, Wishes(**wishes), spec=context.config.model, dataset=context.dataset, device=context.machine.device)
    given = replace(given, name=name) if name else given
    for remark in given.remarks:
        tell(f"note: {remark}")
    metrics = stage.run_given(context, given)
    made = context.workspace.record("evaluate", given.name)
    written = f"{context.workspace.report(given.name)}/metrics.json, samples.parquet, {made}"
    tell_result(given.name, metrics, written, context, as_json=as_json)
