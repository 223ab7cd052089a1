"""What `advml tune` costs beside training and attacking: the share of a study's worker time that no trial has used.

Worker time is wall time times workers, from the first command to the last file: imports, the database, choosing parameters,
MLflow, figures and idle workers all count. A trial's own time is what its objective took. The target is at most 5 % of a
ten-minute study. The fixed part (imports, figures, MLflow's start) and the part per trial are told apart by two studies that differ
in the number of trials alone; trials of TRAINING seconds stand in for training, because what is measured is everything else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from timing import hardware_line

from advml import config
from advml.tuning.command import tune
from advml.tuning.search import Attempt, Bench, Search, hyperband, rungs
from advml.tuning.storage import address

REPOSITORY = Path(__file__).parents[1]
STUDY_SECONDS, TARGET = 600.0, 0.05
EPOCHS = 10


@dataclass(frozen=True, kw_only=True)
class Waiting(Search, Bench):
    """The space of `advml tune finetune`, whose training is a wait of `seconds`, reported as training would be."""

    seconds: float
    name: str = "bench"
    kind = "finetune"
    work = "advml.tuning.training_trial"

    def default(self) -> dict[str, object]:
        return {key: getattr(self.config.regimes["Full-AT"], key) for key in self.space}

    def proposal(self, values: dict[str, object]) -> dict[str, object]:
        return dict(values)

    def fingerprint(self) -> str:
        return self.name

    def pruner(self) -> optuna.pruners.BasePruner:
        return hyperband(EPOCHS)

    def tags(self) -> dict[str, str]:
        return {"search": "benchmark"}

    def open(self) -> Bench:
        importlib.import_module(self.work)  # what a process of a real search imports
        return self

    def objective(self, attempt: Attempt) -> Sequence[float]:
        score = 1 - abs(attempt.values["label_smoothing"] - 0.1)
        for epoch in range(1, EPOCHS + 1):
            time.sleep(self.seconds / EPOCHS)
            attempt.history.append({"epoch": epoch, "train/loss": 1.0, "validation/robust": score})
            if epoch in rungs(EPOCHS):
                with contextlib.suppress(optuna.TrialPruned):  # all trials run to the end, so that all studies do the same
                    attempt.report(epoch, score)
        attempt.constraints["clean_floor"] = -0.01
        return (score,)

    def confirm(self, values: dict[str, object]) -> dict[str, object]:
        return {}


def overhead(trials: int, *, workers: int, seconds: float) -> float:
    """Worker seconds that a whole study of so many trials spends outside of them."""
    from tuning_overhead import Waiting  # under a name that the processes of trials can import

    root, settings = Path(tempfile.mkdtemp(prefix="advml-bench-")), config.load(REPOSITORY / "params.yaml")
    started = time.perf_counter()
    tune(Waiting(config=settings, root=root, seconds=seconds), storage=None, trials=trials, slots=workers)
    spent = (time.perf_counter() - started) * workers
    study = optuna.load_study(study_name="bench", storage=address(None, root=root))
    shutil.rmtree(root)
    return spent - sum(seconds for _ in study.get_trials())


def main() -> None:
    parser = argparse.ArgumentParser(description="The overhead of a search.")
    parser.add_argument("--quick", action="store_true", help="fewer trials, one round")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--training", type=float, default=1.0, help="seconds of a trial")
    parser.add_argument("--trial", type=float, default=30.0, help="seconds of a trial in the study that is told of: digits, CL-Full-AT")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    few, many, rounds = (4, 12, 1) if options.quick else (8, 40, 3)
    fixed, per_trial = [], []
    for _ in range(rounds):
        first, second = (overhead(count, workers=options.workers, seconds=options.training) for count in (few, many))
        per_trial.append((second - first) / (many - few))
        fixed.append(first - few * per_trial[-1])
    start, measured = statistics.median(fixed), statistics.median(per_trial)
    each = max(0.0, measured)  # less than nothing is noise: printed as measured, and not counted in the share's favour
    capacity = STUDY_SECONDS * options.workers
    trials = int((capacity - start) / (options.trial + each))
    share = (start + trials * each) / capacity
    print(
        f"## Overhead of a search\n\n{hardware_line('optuna', 'mlflow')}; {options.workers} workers; SQLite; median of {rounds} rounds.\n"
    )
    print("| worker seconds | value |\n|---|---|")
    print(f"| per command (imports, database, MLflow, figures) | {start:.1f} |")
    print(f"| per trial (parameters, reports, MLflow, waiting for the last one) | {measured:.2f} |")
    print(f"| share of a {STUDY_SECONDS:.0f} s study of {trials} trials of {options.trial:.0f} s | {share:.1%} |")
    print(f"\nTarget: at most {TARGET:.0%}; {'kept' if share <= TARGET else 'MISSED'}.")


if __name__ == "__main__":
    main()
