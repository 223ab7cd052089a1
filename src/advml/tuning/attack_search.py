"""The search for the strongest attack within a budget: its space, its default, and what its winner means in params.yaml."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advml.config import Config, changed, digest
from advml.errors import UserError
from advml.paths import Workspace, checked_name, find_model
from advml.provenance import source_digest
from advml.tuning import space as spaces
from advml.tuning.budget import passes, steps_within
from advml.tuning.search import Attempt, Definition, data_digest, digest_of, tpe, wilcoxon
from advml.tuning.space import Values

# Keys of the space: all of an attack but its budget and its threat model.
KEYS = ("step_size", "schedule", "momentum", "objective", "restarts", "random_start", "keep")


@dataclass(frozen=True)
class AttackSearch:
    """The attack that leaves a model least accuracy at a fixed number of forward and backward passes."""

    config: Config
    root: Path
    model: str  # a name or folder
    folder: Path
    autoattack: bool = True
    chosen_name: str | None = None
    metrics: tuple[str, ...] = ("robust",)
    floor_key: str | None = None  # an attack has no floor to keep

    @classmethod
    def of(cls, configuration: Config, root: Path, model: str, *, autoattack: bool = True, name: str | None = None) -> AttackSearch:
        """Raises UserError: there is no such model, or the space is wrong."""
        folder = find_model(Workspace(root), model).resolve()
        search = cls(configuration, root.resolve(), folder.name, folder, autoattack, name)
        checked_name(search.name)
        if search.budget < configuration.evaluate.restarts:
            raise UserError(
                f"tune.attack.budget = {search.budget} has no step for each of evaluate.restarts = {configuration.evaluate.restarts}"
            )
        spaces.check(search.space, search.accept, section="tune.attack.space")
        return search

    @property
    def name(self) -> str:
        return self.chosen_name or f"attack-{self.model}"

    @property
    def space(self) -> spaces.Space:
        return self.config.tune.attack.space

    @property
    def once(self) -> tuple[str, ...]:
        return ("autoattack",) if self.autoattack else ()

    @property
    def budget(self) -> int:
        """Steps times restarts of the default."""
        return self.config.tune.attack.budget or self.config.evaluate.steps * self.config.evaluate.restarts

    @property
    def passes(self) -> int:
        """Forward and backward passes of the default per image: no attack has more."""
        spec = self.config.evaluate
        return sum(passes(steps=self.budget // spec.restarts, restarts=spec.restarts, keep=spec.keep).values())

    def steps(self, values: Values) -> int:
        """Steps of each restart that the budget has room for."""
        found = self.default() | values
        return steps_within(self.passes, restarts=found["restarts"], keep=found["keep"])

    def default(self) -> Values:
        """The attack of `evaluate`, with as many steps as the budget allows."""
        spec = self.config.evaluate
        steps = self.budget // spec.restarts
        ordinary = spec.step_size / self.config.attacked_epsilon if spec.step_size else 1.0 if steps == 1 else 2.5 / steps
        return {key: ordinary if key == "step_size" else getattr(spec, key) for key in KEYS}

    def missed(self) -> Values:
        """The default's values that the space does not contain: the search does not start from it, then."""
        return spaces.outside(self.default(), self.space)

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

    def definition(self) -> Definition:
        spec, default = self.config.tune.attack, self.default()
        inputs = (dict(self.space), self.budget, spec.images, spec.batch_size, spec.seed)
        threat = (self.config.threat_model.norm, self.config.attacked_epsilon)
        model = digest_of(self.folder / "model.json", remedy="evaluate needs it, too")
        subject = (*threat, default, self.passes, self.config.evaluate.seed, model, data_digest(self.root), self.config.runtime.precision)
        code = source_digest("evaluate")  # random starts and what counts as broken follow from it
        return Definition(
            name=self.name,
            directions=("minimize",),
            distributions=spaces.distributions(self.space),
            default=None if self.missed() else {key: default[key] for key in self.space},
            fingerprint=digest(*inputs, *subject, code),
            pruner=wilcoxon,
            sampler=tpe,
        )

    def tags(self) -> dict[str, Any]:
        return {"search": "attack", "model": self.model}

    def parameters(self) -> dict[str, Any]:
        return {"tune": {"attack": {**self.config.tune.attack.model_dump(mode="json"), "budget": self.budget}}}

    # The work, which imports torch

    def open(self) -> Callable[[Attempt], Sequence[float]]:
        from advml.tuning import attack_trial

        return attack_trial.objective(self)

    def confirm(self, values: Values) -> dict[str, Any]:
        from advml.tuning import attack_trial

        return attack_trial.confirm(self, values)

    def measure(self, name: str) -> dict[str, Any]:
        from advml.tuning import attack_trial

        return {"autoattack": attack_trial.under_autoattack}[name](self)
