"""MLflow as history: written to while stages work, never read to compute a result.

A store that is down or broken costs one warning line on stderr and a few seconds, once per process: from then on every call does nothing.
The results are in the files, from which `sync` rebuilds what is missing. Nothing here imports mlflow (2 s) before a store is opened.
"""

from __future__ import annotations

# ruff: noqa: F401 - names of the package
from advml.tracking.registry import register_exported
from advml.tracking.run import Run, open_run
from advml.tracking.search import SearchRun, Trial, open_search
from advml.tracking.store import warn_if_unusable
from advml.tracking.sync import log_folder, log_model, log_result, sync
