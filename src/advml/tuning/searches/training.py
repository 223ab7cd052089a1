"""The search for a training: its space, its default, and what makes it another study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna

from advml.config import Config, digest
from advml.errors import UserError
from advml.paths import checked_name
from advml.recipes import REGIMES, SCHEMES
from advml.tuning import space as spaces
from advml.tuning.sampling import Hyperband, tpe
from advml.tuning.searches.files import data_digest
from advml.tuning.searches.trained import Trained
from advml.tuning.space import Values
from advml.tuning.study import Definition
from advml.tuning.worker import Attempt


@dataclass(frozen=True)
class TrainingSearch(Trained):
    """The training that makes a model most robust and keeps its clean accuracy.

    Attributes:
        pareto: the front of robust and clean accuracy, instead of a floor for the latter.
        left_out: keys of the space that have no effect here.
    """

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
        checked_name(whole.name)
        if kind == "finetune" and not REGIMES[which].finetunes(SCHEMES[scheme]):
            able = ", ".join(name for name, regime in REGIMES.items() if regime.finetunes(SCHEMES[scheme]))
            raise UserError(f"{scheme} pretrains its classifier, so {which} has nothing to fine-tune; choose from {able}")
        if not whole.given:
            raise UserError(
                f"{whole.section} is empty; name a key and its range, e.g. {whole.section}.learning_rate: {{log: [1e-4, 1e-1]}}"
            )
        whole.check_keys()
        whole.record()
        search = cls(configuration, root.resolve(), kind, scheme, which, seed, pareto, name, whole.without_effect())
        spaces.check(search.space, search.accept, section=search.section)
        return search

    @property
    def name(self) -> str:
        return self.chosen_name or f"{self.kind}-{self.scheme}-{self.which}-s{self.seed}{'-pareto' if self.pareto else ''}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("robust", "clean") if self.pareto else ("robust",)

    @property
    def space(self) -> spaces.Space:
        return {key: dimension for key, dimension in self.given.items() if key not in self.left_out}

    @property
    def most_epochs(self) -> int:
        """Hyperband's largest resource."""
        return int(max(spaces.corners(self.space["epochs"]))) if "epochs" in self.space else self.base("epochs")

    def tags(self) -> dict[str, Any]:
        return {"search": self.kind, "scheme": self.scheme, "phase" if self.kind == "pretrain" else "regime": self.which, "seed": self.seed}

    def parameters(self) -> dict[str, Any]:
        return {"tune": {self.kind: {**self.spec.model_dump(mode="json"), "space": dict(self.space)}}}

    def missed(self) -> Values:
        """The default's values that the space does not contain: the search does not start from it, then."""
        return spaces.outside({key: self.base(key) for key in self.space}, self.space)

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
        return (given, self.record().get("digest"), data_digest(self.root), self.config.runtime.precision)

    def open(self) -> Callable[[Attempt], Sequence[float]]:
        from advml.tuning import training

        return training.objective(self)

    @property
    def once(self) -> tuple[str, ...]:
        return ()

    def measure(self, name: str) -> dict[str, Any]:
        raise KeyError(name)  # nothing of a training is measured apart: `once` is empty

    def confirm(self, values: Values) -> dict[str, Any]:
        from advml.tuning import training

        return training.confirm(self, values)
