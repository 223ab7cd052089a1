"""A model's CKA report as artifacts of its run: figures, an image for the UI's grid across runs, a table of scalars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from advml.paths import Workspace
from advml.tracking.files import read

if TYPE_CHECKING:
    from advml.tracking.run import Run

FIGURES = ("cka.png", "layers.png")


def log_representation(run: Run, workspace: Workspace, name: str) -> None:
    """Log what `represent` has written; nothing if it is not there, of other weights, or the run has it already."""
    folder, made = workspace.report(name), workspace.record("represent", name)
    if not (made.exists() and all((folder / file).exists() for file in FIGURES)):
        return
    record = read(made, needs=("cka", "digest", "metrics"))
    if run.tag("advml.cka") == record["cka"] or record["digest"] != run.tag("advml.digest"):
        return
    run.log_metrics(record["metrics"])
    scalars = {key: value for key, value in record["metrics"].items() if key.count("/") == 1 and value is not None}
    for file in (*(folder / figure for figure in FIGURES), folder / "cka.json", folder / "cka.npz"):
        run.log_file(Path(file), "cka")
    run.log_image(folder / "cka.png", key="cka")
    run.log_image(folder / "layers.png", key="layers")
    run.log_table([{"model": name, **scalars}], "cka/scalars.json")
    run.log_file(made, "records/represent")
    run.set_tag("advml.cka", record["cka"])
