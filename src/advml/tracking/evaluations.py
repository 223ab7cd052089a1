"""What `evaluate` has written, in the run of its model: parameters, metrics, flags, the record and the samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advml.evaluation.flag_summary import flag_summary
from advml.paths import Workspace
from advml.tracking.files import digest, read

if TYPE_CHECKING:
    from advml.tracking.run import Run

TAG = "advml.evaluation"  # sha256 of record and samples, written last: it says that all of it has been logged
METRICS = ("accuracy", "corruption", "diagnostics")  # first words of what an evaluation measures


def log_evaluation(run: Run, workspace: Workspace, name: str) -> bool:
    """Log an evaluation from its files, as the stage and `sync` do.

    Returns:
        Whether there was anything to log: False if none is of these weights, or the run has it already.
    """
    made, samples = workspace.record("evaluate", name), workspace.samples(name)
    if not made.exists() or run.tag(TAG) == (logged := digest(*(path for path in (made, samples) if path.exists()))):
        return False
    record = read(made, needs=("digest", "metrics"))
    if record["digest"] != run.tag("advml.digest"):  # trained anew, and not yet measured
        return False
    run.log_params(record.get("parameters", {}))
    run.log_metrics(record["metrics"], instead_of=METRICS)
    run.set_tag("advml.flags", flag_summary(record.get("diagnostics", {})))
    run.log_file(made, "records/evaluate")
    if samples.exists():
        run.log_file(samples, "samples")
    run.set_tag(TAG, logged)
    return True
