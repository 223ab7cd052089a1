"""The commands `init` and `doctor`. Heavy modules are imported inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from advml.cli.options import PARAMS, PRESETS, AsJson, Overrides, Params, Quick
from advml.cli.printing import say, say_json


def init(
    name: Annotated[str, typer.Argument(metavar="PRESET", help=f"Name of the preset: {PRESETS}.")] = "digits",
    folder: Annotated[Path, typer.Option(help="Folder of the new study.")] = Path(),
    quick: Quick = False,
    overrides: Overrides = None,
) -> None:
    """Create a study in an empty folder, or complete one that was cloned; existing files are not changed.

    Writes params.yaml, dvc.yaml, .dvcignore, .gitignore, README.md and a link to the package, and initialises git and DVC.
    Next: dvc repro
    """
    from advml.pipeline.new_study import new_study

    written = new_study(folder, name, quick=quick, overrides=overrides or ())
    there = "" if folder == Path() else f"cd {folder} && "
    first = "set data.path and data.image_size in params.yaml, then: " if name == "folder" else ""
    say(", ".join(written) or "nothing: all files exist", f"{first}{there}dvc repro")


def doctor(as_json: AsJson = False, params: Params = PARAMS) -> int | None:
    """Print installed versions, device, MLflow and DVC stores, and problems; exit code 1 if there are any.

    Writes nothing. Next: follow its last lines
    """
    from advml.pipeline.doctor import examine

    found = examine(params)
    if as_json:
        say_json(found)
    else:
        for section in ("installed", "device", "stores"):
            width = max(map(len, found[section]))
            print("\n".join([section, *(f"  {name:{width}}  {value}" for name, value in found[section].items())]))
        print("\n".join(f"! {line}" for line in found["wrong"]) or "no problems found")
    return 1 if found["wrong"] else None


# In the order in which `advml --help` lists them.
COMMANDS = (init, doctor)
