"""MLflow as history: written to while training, never read to compute a result.

    >>> with open_run(config, root=root, name="CL-AT-s0", kind="model", tags=tags, params=params, data=data) as run:
    ...     for history in training:                        # a list of {'epoch': 3, 'train/loss': ...}
    ...         run.log_epochs(history)                     # logs what the store lacks, in one call
    ...     run.log_checkpoint(folder, digest=digest)
    >>> with attach_run(config, root=root, folder=folder) as run:      # later, in another stage
    ...     run.log_metrics({"accuracy/clean": 0.99})

A store that is down or broken costs one warning line on stderr and a few seconds, once per process: from
then on every call does nothing. The results are in the files, from which `sync` rebuilds what is missing.

The store is config.tracking.uri, else MLFLOW_TRACKING_URI, else sqlite in `mlflow.db` with artifacts in
`mlruns/<experiment>/`, both in the project's root: DVC_ROOT in a DVC stage (a queue worker's own folder is
temporary), the workspace elsewhere. Nothing here imports mlflow (2 s) before a store is opened.
"""

from __future__ import annotations

from advml.tracking import results, server
from advml.tracking.evaluations import log_evaluation
from advml.tracking.representations import log_representation
from advml.tracking.results import log_result, log_transfer
from advml.tracking.run import Run
from advml.tracking.runs import find_run, kill_run, open_run, ui_command, ui_link
from advml.tracking.searches import SearchRun, Trial, open_search
from advml.tracking.start import DataInfo
from advml.tracking.store import require_usable, warn_if_unusable
from advml.tracking.sync import attach_run, sync
from advml.tracking.training import log_training

__all__ = [
    "DataInfo",
    "Run",
    "SearchRun",
    "Trial",
    "attach_run",
    "find_run",
    "kill_run",
    "log_evaluation",
    "log_representation",
    "log_result",
    "log_training",
    "log_transfer",
    "open_run",
    "open_search",
    "require_usable",
    "results",
    "server",
    "sync",
    "ui_command",
    "ui_link",
    "warn_if_unusable",
]
