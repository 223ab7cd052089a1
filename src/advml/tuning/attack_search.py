"""The search for the strongest attack within a budget: its space, its default, and what its winner means in params.yaml.

No attack takes more forward and backward passes of an image that nothing breaks than the default does.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna

from advml.config import Config, changed, digest
from advml.core.errors import UserError
from advml.core.paths import Workspace, checked_name, find_model
from advml.core.provenance import source_digest
from advml.tuning import space as spaces
from advml.tuning.search import Search, data_digest, digest_of
from advml.tuning.space import Values

# Keys of the space: all of an attack but its budget and its threat model.
KEYS = ("step_size", "schedule", "momentum", "objective", "restarts", "random_start", "keep")


def passes(*, steps: int, restarts: int, keep: str) -> dict[str, int]:
    """Forward and backward passes of an attack for an image that nothing breaks.

    A restart of n steps takes n of each, one more forward pass if the best iterate is kept, for the value of the last one, and one for
    the prediction. All of them count: an attack with many restarts would get the latter for nothing otherwise.
    """
    return {"forward": restarts * (steps + _besides(keep)), "backward": restarts * steps}


def steps_within(most: int, *, restarts: int, keep: str) -> int:
    """Steps of each restart so that all together stay within `most` passes; 0: there are too many restarts for that."""
    return max(0, (most // restarts - _besides(keep)) // 2)


def _besides(keep: str) -> int:
    """Forward passes of a restart beside those of its steps."""
    return 1 + (keep == "best")


@dataclass(frozen=True)
class AttackSearch(Search):
    """The attack that leaves a model least accuracy at a fixed number of forward and backward passes."""

    config: Config
    root: Path
    folder: Path  # of the model
    autoattack: bool = True
    chosen_name: str | None = None
    kind = "attack"
    directions = ("minimize",)

    @classmethod
    def of(cls, configuration: Config, root: Path, model: str, *, autoattack: bool = True, name: str | None = None) -> AttackSearch:
        """Raises UserError: there is no such model, or the space is wrong."""
        search = cls(configuration, root.resolve(), find_model(Workspace(root), model).resolve(), autoattack, name)
        checked_name(search.name)
        if search.budget < configuration.evaluate.restarts:
            raise UserError(
                f"tune.attack.budget = {search.budget} has no step for each of evaluate.restarts = {configuration.evaluate.restarts}"
            )
        spaces.check(search.space, search.accept, section="tune.attack.space")
        return search

    @property
    def name(self) -> str:
        return self.chosen_name or f"attack-{self.folder.name}"

    @property
    def once(self) -> tuple[str, ...]:
        return ("autoattack",) if self.autoattack else ()

    @property
    def work(self) -> ModuleType:
        from advml.tuning import attack_trial

        return attack_trial

    @property
    def budget(self) -> int:
        """Steps times restarts of the default."""
        return self.spec.budget or self.config.evaluate.steps * self.config.evaluate.restarts

    @property
    def passes(self) -> int:
        """Forward and backward passes of the default per image: no attack has more."""
        spec = self.config.evaluate
        return sum(passes(steps=self.budget // spec.restarts, restarts=spec.restarts, keep=spec.keep).values())

    def steps(self, values: Values) -> int:
        """Steps of each restart that the budget has room for."""
        found = self.default() | values
        return steps_within(self.passes, restarts=found["restarts"], keep=found["keep"])

    def passes_of(self, values: Values) -> dict[str, int]:
        """Forward and backward passes of an attack for an image that nothing breaks."""
        found = self.default() | values
        return passes(steps=self.steps(values), restarts=found["restarts"], keep=found["keep"])

    def default(self) -> Values:
        """The attack of `evaluate`, with as many steps as the budget allows."""
        spec = self.config.evaluate
        steps = self.budget // spec.restarts
        ordinary = spec.step_size / self.config.attacked_epsilon if spec.step_size else 1.0 if steps == 1 else 2.5 / steps
        return {key: ordinary if key == "step_size" else getattr(spec, key) for key in KEYS}

    def accept(self, values: Values) -> None:
        """Raises UserError unless such an attack exists within the budget."""
        if unknown := values.keys() - {*KEYS}:
            raise UserError(f"unknown key '{min(unknown)}'; choose from {', '.join(KEYS)}")
        changed(self.config, {f"evaluate.{key}": value for key, value in values.items()})
        if not self.steps(values):
            restarts = (self.default() | values)["restarts"]
            raise UserError(
                f"restarts = {restarts} leave none of them a step within the budget's {self.passes} forward and backward passes"
            )

    def proposal(self, values: Values) -> dict[str, Any]:
        """Keys of `evaluate`; the step size as a length, and the steps that are left for one restart."""
        found = self.default() | values
        given = {"steps": self.steps(values), **found, "step_size": found["step_size"] * self.config.attacked_epsilon}
        if found["keep"] == self.config.evaluate.keep:
            del given["keep"]
        return {f"evaluate.{key}": value for key, value in given.items()}

    def fingerprint(self) -> str:
        """Of the sources, too: random starts and what counts as broken follow from them."""
        inputs = (dict(self.space), self.budget, self.spec.images, self.spec.batch_size, self.spec.seed)
        threat = (self.config.threat_model.norm, self.config.attacked_epsilon)
        model = digest_of(self.folder / "model.json", remedy="evaluate needs it, too")
        subject = (*threat, self.default(), self.passes, self.config.evaluate.seed, model, data_digest(self.root))
        return digest(*inputs, *subject, self.config.runtime.precision, source_digest("evaluate"))

    def pruner(self) -> optuna.pruners.BasePruner:
        """Stops a trial that the best one beats batch by batch, by the signed-rank test at p < 0.1 (Wilcoxon 1945)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.pruners.WilcoxonPruner()

    def tags(self) -> dict[str, Any]:
        return {"search": "attack", "model": self.folder.name}

    def parameters(self) -> dict[str, Any]:
        whole = super().parameters()
        whole["tune"]["attack"]["budget"] = self.budget
        return whole
