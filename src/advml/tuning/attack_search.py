"""Search for the strongest attack within a budget: its space, its default values, and the keys of params.yaml for its winner.

For an image that is not broken, no attack takes more forward and backward passes than the default.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from advml.config import Config, changed, digest
from advml.core.errors import UserError
from advml.core.paths import Workspace, checked_name, find_model
from advml.core.provenance import source_digest
from advml.tuning import space as spaces
from advml.tuning.search import Search, data_digest, weights_digest
from advml.tuning.space import Values

# Keys of the space: all settings of an attack except its budget and its threat model.
KEYS = ("step_size", "schedule", "momentum", "objective", "restarts", "random_start", "keep")


def passes(*, steps: int, restarts: int, keep: str, **_: Any) -> dict[str, int]:
    """Forward and backward passes of an attack for an image that it does not break.

    A restart of n steps takes n of each, one more forward pass for the value of the last iterate if the best one is kept, and one for the
    prediction, which counts because an attack with many restarts has many.
    """
    return {"forward": restarts * (steps + 1 + (keep == "best")), "backward": restarts * steps}


def steps_within(most: int, *, restarts: int, keep: str, **_: Any) -> int:
    """Largest number of steps per restart such that all restarts stay within `most` passes; 0: too many restarts."""
    return max(0, (most // restarts - 1 - (keep == "best")) // 2)


@dataclass(frozen=True)
class AttackSearch(Search):
    """Search for the attack with the lowest accuracy of a model, at a fixed number of forward and backward passes."""

    folder: Path  # of the model
    once: tuple[str, ...]
    kind = "attack"
    work = "advml.tuning.attack_trial"
    directions = ("minimize",)

    @classmethod
    def of(cls, configuration: Config, root: Path, model: str, *, autoattack: bool = True, name: str | None = None) -> AttackSearch:
        """Build and check a search; raises UserError if the model is missing or of other data, or the space is not valid."""
        folder = find_model(Workspace(root), model).resolve()
        name = checked_name(name or f"attack-{folder.name}")
        search = cls(folder, ("autoattack",) if autoattack else (), config=configuration, root=root.resolve(), name=name)
        if search.spec.budget < configuration.evaluate.restarts:
            raise UserError(
                f"tune.attack.budget = {search.spec.budget} has no step for each of evaluate.restarts = {configuration.evaluate.restarts}"
            )
        spaces.check(search.space, search.accept, section="tune.attack.space")
        search.model_digest()
        return search

    @property
    def spec(self) -> Any:
        """Section `tune.attack`; a budget of null is replaced by steps times restarts of `evaluate`."""
        spec, own = self.config.tune.attack, self.config.evaluate
        return spec.model_copy(update={"budget": spec.budget or own.steps * own.restarts})

    @property
    def passes(self) -> int:
        """Forward and backward passes per image of the default, which are the budget of all attacks."""
        default = self.default()
        return sum(passes(steps=self.spec.budget // default["restarts"], **default).values())

    def default(self) -> Values:
        """Values of the attack of `evaluate`."""
        spec = self.config.evaluate
        steps = self.spec.budget // spec.restarts
        ordinary = spec.step_size / self.config.attacked_epsilon if spec.step_size else 1.0 if steps == 1 else 2.5 / steps
        return {key: ordinary if key == "step_size" else getattr(spec, key) for key in KEYS}

    def attack(self, values: Values) -> Values:
        """All settings of an attack with these values, including the `steps` per restart that the budget allows."""
        found = self.default() | values
        return found | {"steps": steps_within(self.passes, **found)}

    def accept(self, values: Values) -> None:
        """Raise UserError unless an attack with these values exists within the budget."""
        if unknown := values.keys() - {*KEYS}:
            raise UserError(f"unknown key '{min(unknown)}'; choose from {', '.join(KEYS)}")
        changed(self.config, {f"evaluate.{key}": value for key, value in values.items()})
        if not (attack := self.attack(values))["steps"]:
            most = f"the budget's {self.passes} forward and backward passes"
            budget = "tune.attack.budget" if self.config.tune.attack.budget else "evaluate.steps"
            remedy = f"reduce tune.attack.space.restarts, or raise {budget}"
            raise UserError(f"restarts = {attack['restarts']} leave none of them a step within {most}; {remedy}")

    def proposal(self, values: Values) -> dict[str, Any]:
        """Values by their keys in section `evaluate`, with an absolute step size, and the steps per restart."""
        attack = self.attack(values)
        attack["step_size"] *= self.config.attacked_epsilon
        return {f"evaluate.{key}": attack[key] for key in ("steps", *KEYS) if key != "keep" or attack[key] != self.config.evaluate.keep}

    def model_digest(self) -> str:
        """Digest of the model's weights; raises UserError if it was trained on other data."""
        return weights_digest(self.folder, self.root, remedy="evaluate needs it, too")

    def fingerprint(self) -> str:
        """Digest of everything that a trial's result depends on, including the sources, which determine random starts and scoring."""
        spec, study = self.spec, self.config
        inputs = (dict(spec.space), spec.budget, spec.images, spec.batch_size, spec.seed)
        threat = (study.threat_model.norm, study.attacked_epsilon)
        subject = (*threat, self.default(), self.passes, study.evaluate.seed, self.model_digest(), data_digest(self.root))
        return digest(*inputs, *subject, study.runtime.precision, source_digest("evaluate"))

    def pruner(self) -> optuna.pruners.BasePruner:
        """Pruner that stops a trial significantly worse than the best, batch by batch, by a signed-rank test at p < 0.1 (Wilcoxon 1945)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.pruners.WilcoxonPruner()

    def tags(self) -> dict[str, Any]:
        return {"search": "attack", "model": self.folder.name}
