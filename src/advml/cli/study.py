"""Begin a study, and say what is wrong with it. Commands import what they need: nothing heavy up here."""

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
    """Begin a study in an empty folder, or mend one that was cloned; files that are there stay.

    Writes params.yaml, dvc.yaml, .dvcignore, .gitignore, README.md, a link to the package, and begins git and DVC. Next: dvc repro
    """
    from advml.pipeline.new_study import new_study

    written = new_study(folder, name, protocol="quick" if quick else "corrected", overrides=overrides or ())
    there = "" if folder == Path() else f"cd {folder} && "
    first = "set data.path and data.image_size in params.yaml, then: " if name == "folder" else ""
    say(", ".join(written) or "nothing: all is there", f"{first}{there}dvc repro")


def doctor(as_json: AsJson = False, params: Params = PARAMS) -> int | None:
    """Print what is installed, which device computes, which stores are used, and what is wrong; exit code 1 if something is.

    Writes nothing. Next: what its last lines say
    """
    from advml.pipeline.doctor import examine

    found = examine(params)
    if as_json:
        say_json(found)
    else:
        for section in ("installed", "device", "stores"):
            width = max(map(len, found[section]))
            print("\n".join([section, *(f"  {name:{width}}  {value}" for name, value in found[section].items())]))
        print("\n".join(f"! {line}" for line in found["wrong"]) or "nothing is wrong")
    return 1 if found["wrong"] else None


# In the order in which `advml --help` lists them.
COMMANDS = (init, doctor)
