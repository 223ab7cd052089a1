"""The command `evaluate`, of the study's models and of anyone's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from advml.cli.options import PARAMS, Overrides, Params, Seed, context_of
from advml.cli.printing import percent, say, show_flags
from advml.config import RegimeName, SchemeName
from advml.errors import UserError
from advml.paths import model_name

if TYPE_CHECKING:
    from advml.stages.context import Context


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SCHEME|MODEL",
            help="SL, CL or SCL, with a regime. Or anyone's model: a folder with model.json, a timm name, or module:function.",
            show_default=False,
        ),
    ],
    regime: Annotated[RegimeName | None, typer.Argument(help="Of the scheme's model.", show_default=False)] = None,
    seed: Seed = 0,
    weights: Annotated[Path | None, typer.Option(help="Of a timm model: a safetensors file with timm's own names.")] = None,
    normalize: Annotated[
        Literal["timm", "data", "none"], typer.Option(help="A timm model expects images less timm's mean, the data's, or as they are.")
    ] = "timm",
    name: Annotated[str | None, typer.Option(help="Of anyone's model, for its files.")] = None,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Measure clean, robust and worst-case accuracy on the test split.

    Writes reports/<MODEL>/metrics.json and samples.parquet, records/evaluate/<MODEL>.json. Next: advml show MODEL
    """
    if target in get_args(SchemeName) and regime is None:
        raise UserError(f"evaluate {target}: which regime? Choose from {', '.join(get_args(RegimeName))}")
    context = context_of(params, overrides)
    from advml.stages import evaluate as stage

    own = {"scheme": target, "regime": regime, "seed": seed} if regime else stage.of_study(context.workspace, target)
    if own is None or name:
        return _evaluate_given(target, weights, normalize, name, context)
    metrics = stage.run(context, **own)
    model = model_name(**own)
    print(f"{model}: {percent(metrics)}")
    show_flags(context.workspace.record("evaluate", model))
    return say(str(context.workspace.report(model)), f"advml show {model}")


def _evaluate_given(target: str, weights: Path | None, normalize: Any, name: str | None, context: Context) -> None:
    from dataclasses import replace

    from advml.networks.given import load
    from advml.stages import evaluate as stage

    given = load(target, weights=weights, normalization=normalize, spec=context.config.model, dataset=context.dataset)
    given = replace(given, name=name) if name else given
    if given.data and given.data != context.dataset.digest:
        print(f"{given.name} was trained on other data: test images may be among those it has learnt from", file=sys.stderr)
    metrics = stage.run_given(context, given)
    print(f"{given.name}: {percent(metrics)}")
    show_flags(context.workspace.report(given.name) / "evaluation.json")
    say(f"{context.workspace.report(given.name)}/metrics.json, evaluation.json, samples.parquet", "make ui")
