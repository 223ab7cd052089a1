"""What a training phase has written, in its run: the curves, point by point and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from advml.paths import Workspace
from advml.tracking.files import digest, read

if TYPE_CHECKING:
    from advml.tracking.run import Run

TAG = "advml.training"  # sha256 of model.json and history.json, written last: it says that all of both has been logged


def log_training(run: Run, workspace: Workspace, folder: Path) -> bool:
    """Log model.json and history.json of the model in `folder`, as the stage and `sync` do.

    Returns:
        Whether there was anything to log: False without history.json, or if the run has both files already.
    """
    curves, record = workspace.report(folder.name) / "history.json", folder / "model.json"
    if not curves.exists() or run.tag(TAG) == (made := digest(record, curves)):
        return False
    history, facts = read(curves), read(record)
    run.log_params(facts.get("parameters", {}))
    run.log_epochs(history, at=written(record))
    run.log_model_record(record, commit=facts.get("git_commit"))
    if history:
        from advml.figures.training import training_curves  # matplotlib takes half a second to import: after the work, not before

        run.log_figure(training_curves(history, folder.name, selected=facts.get("epoch")), "curves.png")
    run.set_tag(TAG, made)
    return True


def written(path: Path) -> int:
    """When a file was written, in milliseconds since 1970: the time of what happened while no store was looking."""
    return int(1000 * path.stat().st_mtime)
