"""What a training phase has written, in its run: the curves, point by point and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from advml.paths import Workspace
from advml.tracking.files import digest, read

if TYPE_CHECKING:
    from advml.tracking.run import Run

TAG = "advml.history"  # sha256 of history.json, written last: it says that all of it has been logged


def log_training(run: Run, workspace: Workspace, folder: Path) -> None:
    """Log history.json of the model in `folder`, as the stage and `sync` do; nothing if there is none or the run has it already."""
    curves = workspace.report(folder.name) / "history.json"
    if not curves.exists() or run.tag(TAG) == (made := digest(curves)):
        return
    history, record = read(curves), folder / "model.json"
    run.log_epochs(history, at=written(record))
    if history:
        from advml.figures.training import training_curves  # matplotlib takes half a second to import: after the work, not before

        run.log_figure(training_curves(history, folder.name, selected=read(record).get("epoch")), "curves.png")
    run.set_tag(TAG, made)


def written(path: Path) -> int:
    """When a file was written, in milliseconds since 1970: the time of what happened while no store was looking."""
    return int(1000 * path.stat().st_mtime)
