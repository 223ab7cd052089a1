"""A search without networks, for tests of the driver. Processes import it by name, so its folder is on their path."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna

from advml.cli.live_table import LiveTable
from advml.config import Config, digest, load
from advml.core.errors import UserError
from advml.tuning import command, outputs
from advml.tuning.search import Attempt, Bench, Search

SPACE = {"x": {"float": [-5, 5]}, "n": {"int": [1, 4]}, "kind": {"choice": ["plain", "odd"]}}
DEFAULT = {"x": 4.0, "n": 1, "kind": "plain"}


MODULES = ("advml.cli", "advml.tuning.outputs", "toy_search")


def written_without_figures(*arguments: object) -> list[Path]:
    """Stands for `outputs.write`, in the process that writes."""
    sys.modules["advml.figures.searches"] = SimpleNamespace(draw=lambda *_, **__: [])
    return outputs.write(*arguments)


class NoRuns:
    """Stands for `tracking.SearchRun`."""

    def __enter__(self) -> NoRuns:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ignore(self, *_: object) -> None:
        pass

    show = mark_best = log_results = ignore


def main(toy: Toy, root: Path, **options: Any) -> None:
    """`advml tune` without figures and MLflow runs, as a process of its own."""
    command.tracking.open_search = lambda *_, **__: NoRuns()
    command.outputs.write = written_without_figures
    command.MODULES = MODULES
    with LiveTable(toy, total=options["trials"]) as table:
        command.tune(replace(toy, config=load(root / "params.yaml"), root=root), watch=table.show, **options)


class Spec:
    """Stands for `tune.toy`."""

    space, seed = SPACE, 0

    def model_dump(self, **_: object) -> dict:
        return {"space": SPACE}


@dataclass(frozen=True)
class Toy(Search, Bench):
    """Minimise x^2 + n in `steps` steps; every trial leaves a line in `log`."""

    log: Path
    _: KW_ONLY
    config: Config | None = None
    root: Path = Path()
    name: str = "toy"
    steps: int = 3
    pause: float = 0.0  # seconds per step
    floor: float | None = None  # x must be at least this
    fails: str = ""  # the kind that fails, or "all"
    unusable: str = ""  # what `open` says
    version: int = 0
    two: bool = False
    make_pruner: Callable[[], optuna.pruners.BasePruner] = optuna.pruners.NopPruner
    far: bool = False  # the default lies outside of the space
    metrics: tuple[str, ...] = ("value",)
    once: tuple[str, ...] = ()
    confirmation: str = ""  # "slow", "killed", "broken", "refused"
    further_seeds: int = 0
    kind = "toy"
    spec = Spec()

    @property
    def directions(self) -> tuple[str, ...]:
        return ("minimize", "maximize") if self.two else ("minimize",)

    def default(self) -> dict:
        return DEFAULT | ({"x": 9.0} if self.far else {})

    def fingerprint(self) -> str:
        return digest(SPACE, self.version)

    def pruner(self) -> optuna.pruners.BasePruner:
        return self.make_pruner()

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)

    def open(self) -> Toy:
        if self.unusable:
            raise UserError(self.unusable)
        return self

    def objective(self, attempt: Attempt) -> Sequence[float]:
        value = attempt.values["x"] ** 2 + attempt.values["n"]
        with self.log.open("a") as file:
            file.write(f"{attempt.scratch.name.removeprefix('trial-')} {os.getpid()} {attempt.values}\n")
        for step in range(1, self.steps + 1):
            time.sleep(self.pause)
            attempt.history.append({"epoch": step, "value": value})
            if not self.two:
                attempt.report(step, value)
        if self.fails in ("all", attempt.values["kind"]):
            raise MemoryError if attempt.values["n"] > 2 else ValueError("nothing works")
        if self.floor is not None:
            attempt.constraints["floor"] = self.floor - attempt.values["x"]
        return (value, attempt.values["x"]) if self.two else (value,)

    def tags(self) -> dict:
        return {"search": "toy"}

    def proposal(self, values: dict) -> dict:
        return {f"toy.{key}": value for key, value in values.items()}

    def autoattack(self) -> dict:
        with self.log.open("a") as file:
            file.write(f"measure {os.getpid()}\n")
        return {"of": "autoattack"}

    def confirm(self, values: dict) -> dict:
        with self.log.open("a") as file:
            file.write(f"confirm {os.getpid()}\n")
        if self.confirmation == "slow":
            time.sleep(60)
        if self.confirmation == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.confirmation == "refused":
            raise UserError("there is no test split")
        if self.confirmation == "broken":
            raise ValueError("nothing works")
        return {"test": {"value": values["x"] ** 2 + values["n"]}}
