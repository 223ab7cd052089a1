"""The command `evaluate`, for models of the study and other models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advml.cli.options import (
    PARAMS,
    AsJson,
    OptionalRegime,
    OptionalSeed,
    Overrides,
    Params,
    Std,
    context_of,
    mean_option,
    target_argument,
)
from advml.cli.printing import percent, say, say_json
from advml.cli.targets import FOLDER, FUNCTION, SCHEME, TIMM, check_options, kind_of, named, of_grid
from advml.core.errors import UserError
from advml.core.messages import tell
from advml.core.paths import Workspace, model_name

if TYPE_CHECKING:
    from advml.pipeline.context import Context

# Kind of target -> options that it accepts.
OPTIONS = {
    SCHEME: ("--seed", "--name"),
    FOLDER: ("--classes", "--name"),
    FUNCTION: ("--mean", "--std", "--classes", "--name"),
    TIMM: ("--weights", "--mean", "--std", "--classes", "--name"),
}


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
    check_options(f"evaluate {target}", kind_of(target, regime, workspace), OPTIONS, given)
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
