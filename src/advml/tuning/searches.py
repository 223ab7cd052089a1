"""What `advml tune` can search, described for all processes; the work itself is in `attack` and `training`.

Nothing here imports torch: the command's own process must start at once, and a space must be refused at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna

from advml import config
from advml.config import Config, changed, digest, flatten
from advml.errors import UserError
from advml.paths import Workspace, find_model, pretraining_name
from advml.tuning import space as spaces
from advml.tuning.sampling import Hyperband, tpe, wilcoxon
from advml.tuning.space import Values
from advml.tuning.study import Definition
from advml.tuning.worker import Attempt

# Keys of the space of attacks; everything of an attack but its budget and its threat model.
ATTACK_KEYS = ("step_size", "schedule", "momentum", "objective", "restarts", "random_start")
UNATTACKED = ("adversarial_weight", "epsilon", "epsilon_warmup", "attack_steps", "loss", "attack.", "threat_model.")
INHERITED = {"epsilon": "threat_model.epsilon", "attack_steps": "attack.steps"}


@dataclass(frozen=True)
class AttackSearch:
    """The attack that leaves a model least accuracy at a fixed number of forward and backward passes."""

    config: Config
    root: Path
    model: str  # a name or folder
    folder: Path
    autoattack: bool = False
    chosen_name: str | None = None
    metrics: tuple[str, ...] = ("robust",)

    @classmethod
    def of(cls, configuration: Config, root: Path, model: str, *, autoattack: bool = False, name: str | None = None) -> AttackSearch:
        """Raises UserError: there is no such model, or the space is wrong."""
        folder = find_model(Workspace(root), model)
        search = cls(configuration, root.resolve(), folder.name, folder.resolve(), autoattack, name)
        spaces.check(search.space, search.accept, section="tune.attack.space")
        return search

    @property
    def name(self) -> str:
        return self.chosen_name or f"attack-{self.model}"

    @property
    def space(self) -> spaces.Space:
        return self.config.tune.attack.space

    @property
    def budget(self) -> int:
        """Forward and backward passes per image."""
        return self.config.tune.attack.budget or self.config.evaluate.steps * self.config.evaluate.restarts

    def default(self) -> Values:
        """The attack of `evaluate`, with as many steps as the budget allows."""
        spec = self.config.evaluate
        steps = max(1, self.budget // spec.restarts)
        ordinary = spec.step_size / self.config.attacked_epsilon if spec.step_size else 1.0 if steps == 1 else 2.5 / steps
        return {
            "step_size": ordinary,
            "schedule": "constant",
            "momentum": 0.0,
            "objective": "ce",
            "restarts": spec.restarts,
            "random_start": spec.random_start,
        }

    def missed(self) -> Values:
        """The default's values that the space does not contain: the search does not start from it, then."""
        return spaces.outside(self.default(), self.space)

    def accept(self, values: Values) -> None:
        """Raises UserError unless such an attack exists within the budget."""
        for key, value in values.items():
            if key not in ATTACK_KEYS:
                raise UserError(f"unknown key '{key}'; choose from {', '.join(ATTACK_KEYS)}")
            wrong = ATTACK_CHECKS[key](value)
            if wrong:
                raise UserError(f"{key} = {value!r}; {wrong}")
        attack = self.default() | values
        if attack["restarts"] > self.budget:
            raise UserError(f"restarts = {attack['restarts']} exceed the budget of {self.budget} passes")

    def definition(self) -> Definition:
        inputs = (dict(self.space), self.budget, self.config.tune.attack.images, self.config.tune.attack.batch_size)
        return Definition(
            name=self.name,
            directions=("minimize",),
            distributions=spaces.distributions(self.space),
            default=None if self.missed() else {key: self.default()[key] for key in self.space},
            fingerprint=digest(*inputs, *self._subject()),
            pruner=wilcoxon,
            sampler=tpe,
        )

    def _subject(self) -> tuple[Any, ...]:
        evaluate = self.config.evaluate
        threat = (self.config.threat_model.norm, self.config.attacked_epsilon, evaluate.steps, evaluate.restarts, evaluate.step_size)
        return (*threat, _record(self.folder)["digest"], _data_digest(self.root), self.config.runtime.precision)

    def open(self) -> Callable[[Attempt], Sequence[float]]:
        from advml.tuning import attack

        return attack.objective(self)

    def tags(self) -> dict[str, Any]:
        return {"search": "attack", "model": self.model}

    def parameters(self) -> dict[str, Any]:
        return {"tune": {"attack": {**self.config.tune.attack.model_dump(mode="json"), "budget": self.budget}}}

    def proposal(self, values: Values) -> dict[str, Any]:
        """Keys of `evaluate`; the step size as a length, and the steps that are left for one restart."""
        found = self.default() | values
        steps = max(1, self.budget // found["restarts"])
        given = {
            "steps": steps,
            "step_size": found["step_size"] * self.config.attacked_epsilon,
            **{key: found[key] for key in ATTACK_KEYS if key != "step_size"},
            "random_start": found["random_start"] or found["restarts"] > 1,  # repetitions start at random anyway
        }
        known = type(self.config.evaluate).model_fields
        return {f"evaluate.{key}": value for key, value in given.items() if key in known}

    def confirm(self, values: Values) -> dict[str, Any]:
        from advml.tuning import attack

        return attack.confirm(self, values)


def _one_of(*choices: Any) -> Callable[[Any], str | None]:
    return lambda value: None if value in choices else f"choose from {', '.join(map(str, choices))}"


def _within(low: float, high: float) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if is_number and low <= value <= high else f"must lie between {low:g} and {high:g}"

    return check


ATTACK_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "step_size": _within(1e-6, 100),
    "schedule": _one_of("constant", "linear", "cosine"),
    "momentum": _within(0, 10),
    "objective": _one_of("ce", "margin", "dlr"),
    "restarts": lambda value: None if isinstance(value, int) and value >= 1 else "must be a whole number, at least 1",
    "random_start": lambda value: None if isinstance(value, bool) else "choose from true, false",
}


@dataclass(frozen=True)
class TrainingSearch:
    """The training that makes a model most robust and keeps its clean accuracy.

    Attributes:
        kind: what is trained.
        which: the phase (st, at) of a pretraining, or the regime of a fine-tuning.
        pareto: the front of robust and clean accuracy, instead of a floor for the latter.
        left_out: keys of the space that have no effect here.
    """

    config: Config
    root: Path
    kind: Literal["pretrain", "finetune"]
    scheme: str
    which: str
    seed: int
    pareto: bool = False
    chosen_name: str | None = None
    left_out: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls,
        configuration: Config,
        root: Path,
        kind: Literal["pretrain", "finetune"],
        scheme: str,
        which: str,
        *,
        seed: int,
        pareto: bool = False,
        name: str | None = None,
    ) -> TrainingSearch:
        """Raises UserError: there is nothing to learn, nothing to start from, or the space is wrong."""
        whole = cls(configuration, root.resolve(), kind, scheme, which, seed, pareto, name)
        if kind == "finetune" and scheme == "SL" and which in ("ST", "AT"):
            raise UserError(f"SL pretrains its classifier, so {which} has nothing to fine-tune; choose Partial-AT or Full-AT")
        if not whole.given:
            raise UserError(
                f"{whole.section} is empty; name a key and its range, e.g. {whole.section}.learning_rate: {{log: [1e-4, 1e-1]}}"
            )
        whole._record()
        search = cls(configuration, root.resolve(), kind, scheme, which, seed, pareto, name, whole._without_effect())
        spaces.check(search.space, search.accept, section=search.section)
        return search

    @property
    def name(self) -> str:
        return self.chosen_name or f"{self.kind}-{self.scheme}-{self.which}-s{self.seed}{'-pareto' if self.pareto else ''}"

    @property
    def section(self) -> str:
        return f"tune.{self.kind}.space"

    @property
    def spec(self) -> config.TrainingSearch:
        return getattr(self.config.tune, self.kind)

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("robust", "clean") if self.pareto else ("robust",)

    @property
    def given(self) -> spaces.Space:
        return self.spec.space

    @property
    def space(self) -> spaces.Space:
        return {key: dimension for key, dimension in self.given.items() if key not in self.left_out}

    @property
    def phase(self) -> str:
        """The section of what is trained, e.g. `regimes.Full-AT`."""
        return f"pretrain.{self.scheme}" if self.kind == "pretrain" else f"regimes.{self.which}"

    @property
    def attacked(self) -> bool:
        return self.which in ("at", "Partial-AT", "Full-AT")

    @property
    def pretraining(self) -> str:
        """What a fine-tuning starts from."""
        return pretraining_name(self.scheme, "st" if self.which == "ST" else "at", self.seed)

    @property
    def most_epochs(self) -> int:
        """Hyperband's largest resource."""
        return int(max(spaces.corners(self.space["epochs"]))) if "epochs" in self.space else self.base("epochs")

    def tags(self) -> dict[str, Any]:
        return {"search": self.kind, "scheme": self.scheme, "phase" if self.kind == "pretrain" else "regime": self.which, "seed": self.seed}

    def parameters(self) -> dict[str, Any]:
        return {"tune": {self.kind: {**self.spec.model_dump(mode="json"), "space": dict(self.space)}}}

    def proposal(self, values: Values) -> dict[str, Any]:
        """Values -> keys of params.yaml: `learning_rate` of the phase, `view.shift` of the scheme's views, all others in full."""
        return {self.full_key(key): value for key, value in values.items()}

    def full_key(self, key: str) -> str:
        if key in config.Phase.model_fields:
            return f"{self.phase}.{key}"
        head, _, tail = key.partition(".")
        return f"views.{'contrastive' if self.scheme != 'SL' else 'supervised'}.{tail}" if head == "view" else key

    def base(self, key: str) -> Any:
        """The value that params.yaml gives a key of the space; null, where a phase takes over a value of the study, is that value."""
        everything = flatten(self.config.model_dump())
        value = everything.get(self.full_key(key))
        return everything[INHERITED[key]] if value is None and key in INHERITED else value

    def missed(self) -> Values:
        """The default's values that the space does not contain: the search does not start from it, then."""
        return spaces.outside({key: self.base(key) for key in self.space}, self.space)

    def accept(self, values: Values) -> Config:
        """The configuration with these values; raises UserError if it refuses them."""
        for key in values:
            if key.partition(".")[0] == "view" and self.kind == "finetune":
                raise UserError(f"unknown key '{key}': a fine-tuning has no views")
        return changed(self.config, self.proposal(values))

    def _without_effect(self) -> tuple[str, ...]:
        """Keys that this scheme, regime or phase has no use for: a space serves them all."""
        return tuple(key for key in self.given if self._is_idle(key))

    def _is_idle(self, key: str) -> bool:
        if not self.attacked and key.startswith(UNATTACKED):
            return True
        if key == "temperature" and self.scheme == "SL":
            return True
        refusals = [self._refusal(key, corner) for corner in spaces.corners(self.given[key])]
        return any(refusals) and all(said is None or " has no effect" in said for said in refusals)

    def _refusal(self, key: str, value: Any) -> str | None:
        try:
            self.accept({key: value})
        except UserError as error:
            return str(error)
        return None

    def definition(self) -> Definition:
        inputs = (
            dict(self.space),
            self.pareto,
            None if self.pareto else self.spec.clean_floor,
            self.kind,
            self.scheme,
            self.which,
            self.seed,
        )
        return Definition(
            name=self.name,
            directions=("maximize", "maximize") if self.pareto else ("maximize",),
            distributions=spaces.distributions(self.space),
            default=None if self.missed() else {key: self.base(key) for key in self.space},
            fingerprint=digest(*inputs, *self._subject()),
            pruner=Hyperband(self.most_epochs) if not self.pareto else optuna.pruners.NopPruner,
            sampler=tpe,
        )

    def _subject(self) -> tuple[Any, ...]:
        """Everything that a trial's result depends on, but for the values."""
        sections = ["threat_model", "attack", "evaluate"]
        sections += ["model", "temperature", "views", "regimes"] if self.kind == "pretrain" else []
        everything = self.config.model_dump(mode="json")
        name, part = self.phase.split(".")
        given = {**{section: everything[section] for section in sections}, self.phase: everything[name][part]}
        return (given, self._record().get("digest"), _data_digest(self.root), self.config.runtime.precision)

    def _record(self) -> dict[str, Any]:
        """Of the pretrained encoder that a fine-tuning starts from."""
        if self.kind == "pretrain":
            return {}
        folder = Workspace(self.root).pretrained(self.pretraining)
        if not (folder / "model.json").is_file():
            phase = "st" if self.which == "ST" else "at"
            raise UserError(f"there is no {folder}; make it with: advml pretrain {self.scheme} {phase} --seed {self.seed}")
        return _record(folder)

    def open(self) -> Callable[[Attempt], Sequence[float]]:
        from advml.tuning import training

        return training.objective(self)

    def confirm(self, values: Values) -> dict[str, Any]:
        from advml.tuning import training

        return training.confirm(self, values)


def _record(folder: Path) -> Mapping[str, Any]:
    """model.json, read without the package that knows all about it, which imports torch."""
    try:
        return json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'model.json'} cannot be read: {error}") from None


def _data_digest(root: Path) -> str:
    path = Workspace(root).prepared / "dataset.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"there are no data in {path.parent}; make them with: advml prepare") from None
