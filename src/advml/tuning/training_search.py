"""The search for better training: its space, what the keys stand for in params.yaml, its default, and what makes it another study."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import optuna

from advml import config
from advml.config import Config, changed, digest, flatten
from advml.core.errors import UserError
from advml.core.paths import Workspace, checked_name, pretraining_name
from advml.recipes import REGIMES, SCHEMES
from advml.tuning import space as spaces
from advml.tuning.search import Search, data_digest, digest_of, hyperband
from advml.tuning.space import Values

# Where a phase leaves one of these null, the value of the study counts.
INHERITED = {"epsilon": "threat_model.epsilon", "attack_steps": "attack.steps"}


@dataclass(frozen=True)
class TrainingSearch(Search):
    """The training that makes a model most robust and keeps its clean accuracy.

    Attributes:
        which: the phase (st, at) of a pretraining, or the regime of a fine-tuning.
        pareto: the front of robust and clean accuracy, instead of a floor for the latter.
        left_out: keys of params.yaml's space that have no effect here.
    """

    kind: Literal["pretrain", "finetune"]
    scheme: str
    which: str
    seed: int
    pareto: bool = False
    left_out: tuple[str, ...] = ()
    work = "advml.tuning.training_trial"

    @classmethod
    def of(cls, configuration: Config, root: Path, *what: Any, seed: int, pareto: bool = False, name: str | None = None) -> TrainingSearch:
        """TrainingSearch.of(config, root, "finetune", "CL", "Full-AT", seed=0), checked.

        Raises:
            UserError: there is nothing to learn, nothing to start from, or the space is wrong.
        """
        name = checked_name(name or f"{'-'.join(what)}-s{seed}{'-pareto' if pareto else ''}")
        whole = cls(*what, seed, pareto, config=configuration, root=root.resolve(), name=name)
        scheme, section = SCHEMES[whole.scheme], f"tune.{whole.kind}.space"
        if whole.kind == "finetune" and not REGIMES[whole.which].finetunes(scheme):
            able = ", ".join(name for name, regime in REGIMES.items() if regime.finetunes(scheme))
            raise UserError(f"{scheme.name} pretrains its classifier, so {whole.which} has nothing to fine-tune; choose from {able}")
        whole.check_keys()
        whole.start_digest()
        left_out = tuple(key for key in whole.space if whole.is_idle(key))
        space = {key: dimension for key, dimension in whole.space.items() if key not in left_out}
        search = replace(whole, left_out=left_out, config=changed(configuration, {section: space}))
        spaces.check(search.space, search.accept, section=section)
        return search

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("robust", "clean") if self.pareto else ("robust",)

    @property
    def directions(self) -> tuple[str, ...]:
        return ("maximize",) * len(self.metrics)

    @property
    def further_seeds(self) -> int:
        return self.spec.confirm

    @property
    def phase(self) -> str:
        """The section of what is trained, e.g. `regimes.Full-AT`."""
        return f"pretrain.{self.scheme}" if self.kind == "pretrain" else f"regimes.{self.which}"

    @property
    def attacked(self) -> bool:
        """Whether what is trained here is trained under attack."""
        return self.which == "at" if self.kind == "pretrain" else REGIMES[self.which].attacked

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
                raise UserError(f"tune.{self.kind}.space has an unknown key {key!r}; choose from {', '.join(known)}")

    def is_idle(self, key: str) -> bool:
        """Whether this scheme, regime or phase has no use for a key: a space serves them all."""
        clean = not self.attacked and key in config.OF_THE_ATTACK
        return clean or key in config.WITHOUT_EFFECT.get(self.phase, ()) or (key == "temperature" and SCHEMES[self.scheme].groups is None)

    # The study

    def start_digest(self) -> str | None:
        """Digest of the pretrained encoder that a fine-tuning starts from."""
        if self.kind == "pretrain":
            return None
        phase = REGIMES[self.which].pretraining
        folder = Workspace(self.root).pretrained(pretraining_name(self.scheme, phase, self.seed))
        return digest_of(folder / "model.json", remedy=f"make it with: advml pretrain {self.scheme} {phase} --seed {self.seed}")

    def fingerprint(self) -> str:
        """Of all that a trial's result depends on, but for the values."""
        everything, (section, name) = self.config.model_dump(mode="json"), self.phase.split(".")
        sections = ["threat_model", "attack", "evaluate"]
        sections += ["model", "temperature", "views", "regimes"] if self.kind == "pretrain" else []
        given = {**{key: everything[key] for key in sections}, self.phase: everything[section][name]}
        subject = (given, self.start_digest(), data_digest(self.root), self.config.runtime.precision)
        floor = None if self.pareto else self.spec.clean_floor
        return digest(dict(self.space), self.pareto, floor, self.kind, self.scheme, self.which, self.seed, *subject)

    def pruner(self) -> optuna.pruners.BasePruner:
        """Hyperband, whose largest resource is the most epochs of any trial; a front is searched without."""
        if self.pareto:
            return optuna.pruners.NopPruner()
        return hyperband(int(max(spaces.corners(self.space["epochs"]))) if "epochs" in self.space else self.base("epochs"))

    def tags(self) -> dict[str, Any]:
        return {"search": self.kind, "scheme": self.scheme, "phase" if self.kind == "pretrain" else "regime": self.which, "seed": self.seed}
