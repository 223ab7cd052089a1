"""The search for better training: its space, what the keys stand for in params.yaml, its default, and what makes it another study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import optuna

from advml import config
from advml.config import Config, changed, digest, flatten
from advml.errors import UserError
from advml.paths import Workspace, checked_name, pretraining_name
from advml.recipes import REGIMES, SCHEMES, PhaseName
from advml.tuning import space as spaces
from advml.tuning.search import Attempt, Definition, Hyperband, data_digest, digest_of, tpe
from advml.tuning.space import Values

# Keys that only a training under attack has a use for.
UNATTACKED = ("adversarial_weight", "epsilon", "epsilon_warmup", "attack_steps", "loss")
# Where a phase leaves one of these null, the value of the study counts.
INHERITED = {"epsilon": "threat_model.epsilon", "attack_steps": "attack.steps"}


@dataclass(frozen=True)
class TrainingSearch:
    """The training that makes a model most robust and keeps its clean accuracy.

    Attributes:
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
    left_out: tuple[str, ...] = ()
    once: tuple[str, ...] = ()  # nothing of a training is measured apart

    @classmethod
    def of(cls, configuration: Config, root: Path, *what: Any, seed: int, pareto: bool = False, name: str | None = None) -> TrainingSearch:
        """TrainingSearch.of(config, root, "finetune", "CL", "Full-AT", seed=0), checked.

        Raises:
            UserError: there is nothing to learn, nothing to start from, or the space is wrong.
        """
        whole = cls(configuration, root.resolve(), *what, seed, pareto, name)
        checked_name(whole.name)
        scheme = SCHEMES[whole.scheme]
        if whole.kind == "finetune" and not REGIMES[whole.which].finetunes(scheme):
            able = ", ".join(name for name, regime in REGIMES.items() if regime.finetunes(scheme))
            raise UserError(f"{scheme.name} pretrains its classifier, so {whole.which} has nothing to fine-tune; choose from {able}")
        if not whole.space:
            raise UserError(
                f"{whole.section} is empty; name a key and its range, e.g. {whole.section}.learning_rate: {{log: [1e-4, 1e-1]}}"
            )
        whole.check_keys()
        whole.start_digest()
        search = replace(whole, left_out=tuple(key for key in whole.space if whole.is_idle(key)))
        spaces.check(search.space, search.accept, section=search.section)
        return search

    @property
    def name(self) -> str:
        return self.chosen_name or f"{self.kind}-{self.scheme}-{self.which}-s{self.seed}{'-pareto' if self.pareto else ''}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("robust", "clean") if self.pareto else ("robust",)

    @property
    def spec(self) -> config.TrainingSearch:
        return getattr(self.config.tune, self.kind)

    @property
    def section(self) -> str:
        return f"tune.{self.kind}.space"

    @property
    def floor_key(self) -> str:
        return f"tune.{self.kind}.clean_floor"

    @property
    def space(self) -> spaces.Space:
        return {key: dimension for key, dimension in self.spec.space.items() if key not in self.left_out}

    @property
    def phase(self) -> str:
        """The section of what is trained, e.g. `regimes.Full-AT`."""
        return f"pretrain.{self.scheme}" if self.kind == "pretrain" else f"regimes.{self.which}"

    @property
    def attacked(self) -> bool:
        """Whether what is trained here is trained under attack."""
        return self.which == "at" if self.kind == "pretrain" else REGIMES[self.which].attacked

    @property
    def start(self) -> PhaseName:
        """The phase of the pretraining that a fine-tuning starts from."""
        return REGIMES[self.which].pretraining

    @property
    def most_epochs(self) -> int:
        """Hyperband's largest resource."""
        return int(max(spaces.corners(self.space["epochs"]))) if "epochs" in self.space else self.base("epochs")

    # Keys and values

    def proposal(self, values: Values) -> dict[str, Any]:
        """Values -> keys of params.yaml: `learning_rate` of the phase, `view.shift` of the scheme's views, all others in full."""
        return {self.full_key(key): value for key, value in values.items()}

    def full_key(self, key: str) -> str:
        if key in config.Phase.model_fields:
            return f"{self.phase}.{key}"
        head, _, tail = key.partition(".")
        return f"views.{SCHEMES[self.scheme].view}.{tail}" if head == "view" else key

    def base(self, key: str) -> Any:
        """The value that params.yaml gives a key of the space; null, where a phase takes over a value of the study, is that value."""
        everything = flatten(self.config.model_dump())
        value = everything.get(self.full_key(key))
        return everything[INHERITED[key]] if value is None and key in INHERITED else value

    def default(self) -> Values:
        return {key: self.base(key) for key in self.space}

    def missed(self) -> Values:
        """The default's values that the space does not contain: the search does not start from it, then."""
        return spaces.outside(self.default(), self.space)

    def accept(self, values: Values) -> Config:
        """The configuration with these values; raises UserError if it refuses them."""
        return changed(self.config, self.proposal(values))

    def check_keys(self) -> None:
        """Raises UserError for a key that is none of what is trained: another section would change what trials are measured by."""
        known = list(config.Phase.model_fields)
        if self.kind == "pretrain":
            known += ["temperature", *(f"view.{key}" for key in config.View.model_fields)]
        for key in self.space:
            if key not in known:
                raise UserError(f"{self.section} has an unknown key {key!r}; choose from {', '.join(known)}")

    def is_idle(self, key: str) -> bool:
        """Whether this scheme, regime or phase has no use for a key: a space serves them all."""
        if (not self.attacked and key.startswith(UNATTACKED)) or (key == "temperature" and SCHEMES[self.scheme].groups is None):
            return True
        refusals = [self._refusal({key: corner}) for corner in spaces.corners(self.space[key])]
        return any(refusals) and all(said is None or " has no effect" in said for said in refusals)

    def _refusal(self, values: Values) -> str | None:
        try:
            self.accept(values)
        except UserError as error:
            return str(error)
        return None

    # The study

    def start_digest(self) -> str | None:
        """Digest of the pretrained encoder that a fine-tuning starts from."""
        if self.kind == "pretrain":
            return None
        folder = Workspace(self.root).pretrained(pretraining_name(self.scheme, self.start, self.seed))
        return digest_of(folder / "model.json", remedy=f"make it with: advml pretrain {self.scheme} {self.start} --seed {self.seed}")

    def definition(self) -> Definition:
        everything, (section, name) = self.config.model_dump(mode="json"), self.phase.split(".")
        # All that a trial's result depends on, but for the values.
        sections = ["threat_model", "attack", "evaluate"]
        sections += ["model", "temperature", "views", "regimes"] if self.kind == "pretrain" else []
        given = {**{key: everything[key] for key in sections}, self.phase: everything[section][name]}
        subject = (given, self.start_digest(), data_digest(self.root), self.config.runtime.precision)
        floor = None if self.pareto else self.spec.clean_floor
        return Definition(
            name=self.name,
            directions=("maximize",) * len(self.metrics),
            distributions=spaces.distributions(self.space),
            default=None if self.missed() else self.default(),
            fingerprint=digest(dict(self.space), self.pareto, floor, self.kind, self.scheme, self.which, self.seed, *subject),
            pruner=optuna.pruners.NopPruner if self.pareto else Hyperband(self.most_epochs),
            sampler=tpe,
        )

    def tags(self) -> dict[str, Any]:
        return {"search": self.kind, "scheme": self.scheme, "phase" if self.kind == "pretrain" else "regime": self.which, "seed": self.seed}

    def parameters(self) -> dict[str, Any]:
        return {"tune": {self.kind: {**self.spec.model_dump(mode="json"), "space": dict(self.space)}}}

    # The work, which imports torch

    def open(self) -> Callable[[Attempt], Sequence[float]]:
        from advml.tuning import training_trial

        return training_trial.objective(self)

    def measure(self, name: str) -> dict[str, Any]:
        raise KeyError(name)

    def confirm(self, values: Values) -> dict[str, Any]:
        from advml.tuning import training_trial

        return training_trial.confirm(self, values)
