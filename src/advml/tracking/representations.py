"""A model's CKA report as artifacts of its run: figures, an image for the UI's grid across runs, a table of scalars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advml.paths import Workspace
from advml.tracking.files import digest, read

if TYPE_CHECKING:
    from advml.tracking.run import Run

FILES = ("cka.json", "cka.npz", "cka.png", "layers.png")
TAG = "advml.representation"  # sha256 of record and files, written last: it says that all of it has been logged
METRICS = ("cka", "probe")  # first words of what a representation is described by


def log_representation(run: Run, workspace: Workspace, name: str) -> bool:
    """Log what `represent` has written.

    Returns:
        Whether there was anything to log: False if the files are not there or of other weights, or the run has them already.
    """
    made, files = workspace.record("represent", name), [workspace.report(name) / file for file in FILES]
    if not all(path.exists() for path in (made, *files)) or run.tag(TAG) == (logged := digest(made, *files)):
        return False
    record = read(made, needs=("digest", "metrics"))
    if record["digest"] != run.tag("advml.digest"):  # trained anew, and not yet measured
        return False
    run.log_params(record.get("parameters", {}))
    run.log_metrics(record["metrics"], instead_of=METRICS)
    scalars = {key: value for key, value in record["metrics"].items() if key.count("/") == 1 and value is not None}
    for file in files:
        if not run.has_file(file, "cka"):
            if file.suffix == ".png":  # first: the grid keeps every picture that it is given, and the file says that it has this one
                run.log_image(file, key=file.stem)
            run.log_file(file, "cka")
    run.log_table([{"model": name, **scalars}], "cka/scalars.json")
    run.log_file(made, "records/represent")
    run.set_tag(TAG, logged)
    return True
