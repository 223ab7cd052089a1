"""A search whose training is a wait, in a module of its own, because the processes that run its trials import it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna

from advml import config
from advml.tuning.search import Attempt, Definition, Hyperband, tpe
from advml.tuning.space import distributions

REPOSITORY = Path(__file__).parents[1]
EPOCHS = 10


@dataclass(frozen=True)
class Waiting:
    """The space of `advml tune finetune`, whose training is a wait of `seconds`, reported as training would be."""

    name: str
    seconds: float
    metrics: tuple[str, ...] = ("robust",)
    once: tuple[str, ...] = ()

    def definition(self) -> Definition:
        space = distributions(config.load(REPOSITORY / "params.yaml").tune.finetune.space)
        return Definition(self.name, ("maximize",), space, None, self.name, optuna.pruners.NopPruner, tpe)  # all studies do the same

    def open(self) -> Callable[[Attempt], Sequence[float]]:
        from advml.tuning import training_trial  # noqa: F401 - what a process of a real search imports

        return self.train

    def train(self, attempt: Attempt) -> Sequence[float]:
        score = 1 - abs(attempt.values["label_smoothing"] - 0.1)
        for epoch in range(1, EPOCHS + 1):
            time.sleep(self.seconds / EPOCHS)
            attempt.history.append({"epoch": epoch, "train/loss": 1.0, "validation/robust": score})
            if epoch in Hyperband.rungs(EPOCHS):
                attempt.report(epoch, score)
        attempt.constraints["clean_floor"] = -0.01
        return (score,)

    def tags(self) -> dict[str, str]:
        return {"search": "benchmark"}

    def parameters(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def proposal(self, values: dict[str, object]) -> dict[str, object]:
        return dict(values)

    def confirm(self, values: dict[str, object]) -> dict[str, object]:
        return {}
