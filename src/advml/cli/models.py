"""Commands on one model: train, show, attack, trust, import, export. Each imports what it runs, so that `advml --help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from advml.cli.options import (
    PARAMS,
    AsJson,
    Overrides,
    Params,
    Processes,
    Regime,
    Scheme,
    Seed,
    Std,
    StudyParams,
    context_of,
    mean_option,
    start,
    store_of,
)
from advml.cli.printing import say, say_json
from advml.cli.stages import tell_result
from advml.core.messages import tell
from advml.core.paths import Workspace, model_name


def train(
    scheme: Scheme,
    regime: Regime,
    seed: Seed = 0,
    processes: Processes = 1,
    as_json: AsJson = False,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Run prepare, pretrain, finetune and evaluate for one model, skipping what is up to date.

    Writes the files of these stages. Next: advml show MODEL
    """
    start(processes)
    context = context_of(params, overrides)
    from advml.pipeline.stages import train as everything
    from advml.tracking import warn_if_unusable

    warn_if_unusable(context.tracking)
    metrics = everything.run(context, scheme=scheme, regime=regime, seed=seed)
    name = model_name(scheme, regime, seed)
    tell_result(name, metrics, f"{context.workspace.model(name)}, {context.workspace.report(name)}", context, as_json=as_json)


def show(
    model: Annotated[
        str,
        typer.Argument(help="A model's name (CL-Full-AT-s0) or folder, or the --name that evaluate was given.", show_default=False),
    ],
    full: Annotated[bool, typer.Option("--full", help="Print all parameters, including those left at their defaults.")] = False,
    params: StudyParams = PARAMS,
    as_json: AsJson = False,
) -> None:
    """Print a model's record: data, settings, training and measurements.

    Writes nothing. Next: advml attack IMAGE --model MODEL
    """
    from advml.report.show import record_of, records_of

    workspace = Workspace(params.parent)
    if as_json:
        return say_json(records_of(workspace, model))
    print(record_of(workspace, model, full=full))
    given = model in workspace.evaluations_of_given()
    print("next: advml report     (the page shows it beside the study's models)" if given else f"next: advml attack IMAGE --model {model}")


def attack(
    image: Annotated[Path, typer.Argument(help="Any image file.", show_default=False)],
    model: Annotated[str, typer.Option(help="A model's name (CL-Full-AT-s0) or folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("attack.png"),
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Attack one image and draw the result: original, perturbation, adversarial image, predictions.

    Writes attack.png. Next: try the same image with a model of another regime
    """
    context = context_of(params, overrides)
    from advml.pipeline.attack_demo import attack_picture

    told = attack_picture(context, image, model=model, out=out)
    print(told)
    say(str(out), f"advml show {model}")


def trust(
    epochs: Annotated[int, typer.Option(help="Epochs of the longest training.")] = 8,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 2,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Score the measures of similarity: train small networks whose order of similarity is known, and test which measures find it.

    Writes records/trust/measures.json, which the report shows. Next: advml report
    """
    context = context_of(params, overrides)
    from advml.pipeline.stages import trust as stage
    from advml.similarity.trust import table

    for line in table(stage.run(context, epochs=epochs, seeds=seeds)["scores"]):
        print("  ".join(f"{cell:>16}" for cell in line))
    say(str(context.workspace.record("trust", "measures")), "advml report")


def import_(
    file: Annotated[Path, typer.Argument(help="Checkpoint: a safetensors file, or one of torch.save (.pt, .pth).", show_default=False)],
    backbone: Annotated[str, typer.Option(help="The timm name of its architecture, e.g. resnet18.", show_default=False)],
    stem: Annotated[str | None, typer.Option(help="Stem of the backbone: small or native.", show_default="the one that fits")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=4, help="Side of its images, in pixels.", show_default="of the prepared data")
    ] = None,
    mean: Annotated[str | None, mean_option("that in the checkpoint's buffers, else none")] = None,
    std: Std = None,
    classes: Annotated[str | None, typer.Option(help="Class names of its logits, in order: a,b,c or a file with one per line.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Tensors to ignore, e.g. 'momentum_*'; may be repeated.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the imported model.", show_default="name of the file")] = None,
    params: StudyParams = PARAMS,
) -> None:
    """Convert a published checkpoint to a model of advml; refuses missing tensors and tensors without a use.

    Writes models/imported/<NAME>/: model.safetensors, model.json. Next: advml evaluate models/imported/NAME
    """
    from advml.pipeline.checkpoint_import import import_checkpoint

    options = {"name": name, "stem": stem, "image_size": image_size, "mean": mean, "std": std, "classes": classes}
    made = import_checkpoint(Workspace(params.parent), file, backbone, **options, without=without or ())
    for remark in made.remarks:
        tell(f"note: {remark}")
    train = f"advml train CL AT -S model.init={made.folder} -S pretrain.CL.epochs=0   (fine-tune it)"
    say(str(made.folder), f"advml evaluate {made.folder}   (evaluate it), or: {train}" if made.architecture.classes else train)


def export(
    model: Annotated[str, typer.Argument(help="A model's name (CL-Full-AT-s0) or folder.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="models/exported/<MODEL>")] = None,
    register: Annotated[bool, typer.Option(help="Register a classifier, with its weights, in MLflow under its name as alias.")] = True,
    overrides: Overrides = None,
    params: Params = PARAMS,
) -> None:
    """Write a model for other tools, and register it in MLflow: weights for timm, and ONNX, both compared with the model's outputs.

    Writes models/exported/<MODEL>/: model.safetensors, config.json, model.onnx. Next: load it with the three lines that it prints
    """
    from advml.pipeline.checkpoint_export import export_model

    place = store_of(params, overrides) if register and params.exists() else None
    made = export_model(Workspace(params.parent), model, out, place=place)
    for remark in made.remarks:
        tell(f"note: {remark}")
    print("\n".join(made.lines))
    if made.registered:
        print(f"# or, of images in [0, 1]: mlflow.pyfunc.load_model({made.registered!r})")
    say(f"{made.folder}: {', '.join(made.files)}", "the three lines above, in Python")
