"""The commands `import` and `export`. Heavy modules are imported inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from advml.cli.options import PARAMS, Overrides, Params, Place, Std, mean_option
from advml.cli.printing import say
from advml.core.messages import tell
from advml.core.paths import Workspace


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
    params: Place = PARAMS,
) -> None:
    """Convert a published checkpoint to a model of advml; refuses missing tensors and tensors without a use.

    Writes models/imported/<NAME>/: model.safetensors, model.json. Next: advml evaluate models/imported/NAME
    """
    from advml.pipeline.checkpoint_import import Wishes, import_checkpoint

    wishes = Wishes(name, stem, image_size, mean, std, classes, tuple(without or ()))
    made = import_checkpoint(Workspace(params.parent), file, backbone, wishes)
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
    from advml.config import load
    from advml.config.store import locate
    from advml.pipeline.checkpoint_export import export_model

    place = locate(load(params, overrides or []).tracking, root=params.parent) if register and params.exists() else None
    made = export_model(Workspace(params.parent), model, out, place=place)
    for remark in made.remarks:
        tell(f"note: {remark}")
    print("\n".join(made.lines))
    if made.registered:
        print(f"# or, of images in [0, 1]: mlflow.pyfunc.load_model({made.registered!r})")
    say(f"{made.folder}: {', '.join(made.files)}", "the three lines above, in Python")


# In the order in which `advml --help` lists them.
COMMANDS = (import_, export)
