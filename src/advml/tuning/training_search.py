"""Search for better training parameters: its space, the params.yaml keys it sets, its default values, and its fingerprint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import optuna

from advml import config
from advml.config import Config, changed, digest, flatten
from advml.core.errors import UserError
from advml.core.paths import Workspace, checked_name, pretraining_name
from advml.core.provenance import init_digest
from advml.recipes import REGIMES, SCHEMES
from advml.tuning import space as spaces
from advml.tuning.search import Search, data_digest, hyperband, weights_digest
from advml.tuning.space import Values


@dataclass(frozen=True)
class TrainingSearch(Search):
    """Search for the training parameters with the highest robust accuracy, with a floor on clean accuracy.

    Attributes:
        which: the phase (st, at) of a pretraining, or the regime of a fine-tuning.
        pareto: maximise robust and clean accuracy (Pareto front) instead of setting a floor.
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
        """Build and check a search, e.g. `TrainingSearch.of(config, root, "finetune", "CL", "Full-AT", seed=0)`.

        Raises:
            UserError: the regime trains nothing for this scheme, the pretrained encoder is missing or was
                trained on other data, or the space is not valid.
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
        """Section of params.yaml whose training is searched, e.g. `regimes.Full-AT`."""
        return f"pretrain.{self.scheme}" if self.kind == "pretrain" else f"regimes.{self.which}"

    @property
    def attacked(self) -> bool:
        """Whether the searched phase trains under attack."""
        return self.which == "at" if self.kind == "pretrain" else REGIMES[self.which].attacked

    # Keys and values

    def proposal(self, values: Values) -> dict[str, Any]:
        """Values by their full keys in params.yaml: `learning_rate` belongs to the phase, `view.shift` to the scheme's views."""
        return {self.full_key(key): value for key, value in values.items()}

    def full_key(self, key: str) -> str:
        if key in config.Phase.model_fields:
            return f"{self.phase}.{key}"
        head, _, tail = key.partition(".")
        return f"views.{SCHEMES[self.scheme].view}.{tail}" if head == "view" else key

    def base(self, key: str) -> Any:
        """Value of a key of the space in params.yaml; for a null that inherits a value of the study, that value."""
        everything = flatten(self.config.model_dump())
        value = everything.get(self.full_key(key))
        return everything[config.INHERITED[key]] if value is None and key in config.INHERITED else value

    def default(self) -> Values:
        return {key: self.base(key) for key in self.space}

    def accept(self, values: Values) -> Config:
        """Configuration with these values; raises UserError if they are not valid."""
        return changed(self.config, self.proposal(values))

    def check_keys(self) -> None:
        """Raise UserError for a key outside the trained phase, which could change how trials are measured."""
        known = list(config.Phase.model_fields)
        if self.kind == "pretrain":
            known += ["temperature", *(f"view.{key}" for key in config.View.model_fields)]
        for key in self.space:
            if key not in known:
                raise UserError(f"tune.{self.kind}.space has an unknown key {key!r}; choose from {', '.join(known)}")

    def is_idle(self, key: str) -> bool:
        """Whether a key has no effect on this scheme, regime or phase; one space in params.yaml serves all of them."""
        clean = not self.attacked and key in config.OF_THE_ATTACK
        return clean or key in self.config.without_effect(self.phase) or (key == "temperature" and not SCHEMES[self.scheme].has_temperature)

    # The study

    def start_digest(self) -> str | None:
        """Digest of the starting weights: of the pretrained encoder for a fine-tuning, of `model.init` for a pretraining."""
        if self.kind == "pretrain":
            return self.config.model.init and init_digest(self.config.model.init)
        phase = REGIMES[self.which].pretraining
        folder = Workspace(self.root).pretrained(pretraining_name(self.scheme, phase, self.seed))
        return weights_digest(folder, self.root, remedy=f"make it with: advml pretrain {self.scheme} {phase} --seed {self.seed}")

    def fingerprint(self) -> str:
        """Digest of everything that a trial's result depends on, except the searched values."""
        everything, (section, name) = self.config.model_dump(mode="json"), self.phase.split(".")
        sections = ["threat_model", "attack", "evaluate"]
        sections += ["model", "temperature", "views", "regimes"] if self.kind == "pretrain" else []
        given = {**{key: everything[key] for key in sections}, self.phase: everything[section][name]}
        subject = (given, self.start_digest(), data_digest(self.root), self.config.runtime.precision)
        floor = None if self.pareto else self.spec.clean_floor
        return digest(dict(self.space), self.pareto, floor, self.kind, self.scheme, self.which, self.seed, *subject)

    def pruner(self) -> optuna.pruners.BasePruner:
        """Hyperband with the largest number of epochs as maximum resource; no pruning for a Pareto search."""
        if self.pareto:
            return optuna.pruners.NopPruner()
        return hyperband(int(max(spaces.corners(self.space["epochs"]))) if "epochs" in self.space else self.base("epochs"))

    def tags(self) -> dict[str, Any]:
        return {"search": self.kind, "scheme": self.scheme, "phase" if self.kind == "pretrain" else "regime": self.which, "seed": self.seed}
