"""What `evaluate` has written, in the run of its model: parameters, metrics, flags, the record and the samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advml.evaluation.verdict import verdict
from advml.paths import Workspace
from advml.tracking.files import digest, read

if TYPE_CHECKING:
    from advml.tracking.run import Run

TAG = "advml.evaluation"  # sha256 of the record, written last: it says that all of it has been logged


def log_evaluation(run: Run, workspace: Workspace, name: str) -> None:
    """Log an evaluation from its files, as the stage and `sync` do; nothing if none is of these weights, or the run has it already."""
    made = workspace.record("evaluate", name)
    if not made.exists() or run.tag(TAG) == (logged := digest(made)):
        return
    record = read(made, needs=("digest", "metrics"))
    if record["digest"] != run.tag("advml.digest"):  # trained anew, and not yet measured
        return
    run.log_params(record.get("parameters", {}))
    run.log_metrics(record["metrics"])
    run.set_tag("advml.flags", verdict(record.get("diagnostics", {})))
    run.log_file(made, "records/evaluate")
    if workspace.samples(name).exists():
        run.log_file(workspace.samples(name), "samples")
    run.set_tag(TAG, logged)
