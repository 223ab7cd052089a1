"""The command `evaluate`, for models of the study and from elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from advml.cli.options import PARAMS, Overrides, Params, context_of
from advml.cli.printing import percent, say, show_flags
from advml.core.errors import UserError
from advml.core.messages import tell
from advml.core.paths import Workspace, model_name
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
    regime: Annotated[RegimeName | None, typer.Argument(help="Of the scheme's model.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the scheme's model.", show_default="0")] = None,
    weights: Annotated[Path | None, typer.Option(help="Of a timm model: a safetensors file with timm's own names.")] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Of the normalisation that the model expects: one number or one per channel, or a name for mean and std: imagenet, "
            "cifar10, cifar100, clip, half (-1 to 1), mnist, levels (0 to 255), data (of the training images), none, of a timm model timm.",
            show_default="none; timm of a timm model",
        ),
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="The same for the standard deviation.", show_default="of the name that --mean gives")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Names of the model's logits, in their order: a,b,c, a file with one per line, or natural (1, 2, 10).",
            show_default="the order of the data's classes",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="For the files of a model from elsewhere, or to measure one of the study anew beside it.")
    ] = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure clean, robust and worst-case accuracy on the test split.

    Writes reports/<MODEL>/metrics.json and samples.parquet; how they were made stands in records/evaluate/<MODEL>.json.
    Next: advml show MODEL
    """
    kind = _kind(target, regime, Workspace(params.parent))
    given = {"--seed": seed, "--weights": weights, "--mean": mean, "--std": std, "--classes": classes, "--name": name}
    for option in (option for option, value in given.items() if value is not None and option not in OPTIONS[kind]):
        raise UserError(f"evaluate {target}: {option} has no meaning for {kind}, which takes {', '.join(OPTIONS[kind])}; leave it out")
    context = context_of(params, overrides)
    from advml.pipeline.stages import evaluate as stage

    own = {"scheme": target, "regime": regime, "seed": seed or 0} if regime else stage.of_study(context.workspace, target)
    wishes = {"weights": weights, "mean": mean, "std": std, "classes": classes}
    if own is None:
        return _evaluate_given(target, wishes, name, context)
    model = model_name(**own)
    if name:
        return _evaluate_given(str(stage.trained(context.workspace, model)), wishes, name, context)
    if classes is not None:
        raise UserError(f"evaluate {target}: --classes has no meaning for a model of this study, whose classes are known; leave it out")
    metrics = stage.run(context, **own)
    print(f"{model}: {percent(metrics)}")
    show_flags(context.workspace.record("evaluate", model))
    return say(str(context.workspace.report(model)), f"advml show {model}")


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


def _evaluate_given(target: str, wishes: dict[str, Any], name: str | None, context: Context) -> None:
    from advml.models.external import Wishes, load
    from advml.pipeline.stages import evaluate as stage

    given = load(target, Wishes(**wishes), spec=context.config.model, dataset=context.dataset, device=context.machine.device)
    given = replace(given, name=name) if name else given
    for remark in given.remarks:
        tell(f"note: {remark}")
    metrics = stage.run_given(context, given)
    print(f"{given.name}: {percent(metrics)}")
    made = context.workspace.record("evaluate", given.name)
    show_flags(made)
    say(f"{context.workspace.report(given.name)}/metrics.json, samples.parquet, {made}", f"advml show {given.name}")
