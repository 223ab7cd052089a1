"""All of params.yaml, and which of its values go together."""

from __future__ import annotations

import json
from itertools import product
from typing import Annotated, Any, get_args

from pydantic import Field, model_validator

from advml.config.evaluation import MINIMAL_NORMS, Corruptions, Diagnostics, EvaluationAttack, Similarity, WorstCase
from advml.config.search import Tune
from advml.config.study import Cluster, Data, Grid, Model, Runtime, ThreatModelSection, Tracking
from advml.config.training import NEUTRAL, WITHOUT_EFFECT, Phase, TrainAttack, Views
from advml.config.values import Distinct, Number, Section, Seed, Some
from advml.names import RegimeName, SchemeName
from advml.paths import model_name


def _plain(value: Any) -> str:
    """As YAML writes it."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


class Config(Section):
    """All of params.yaml."""

    seeds: Annotated[tuple[Annotated[Seed, Field(strict=True)], ...], Some, Distinct]
    grid: Grid
    data: Data
    model: Model
    temperature: Annotated[Number, Field(ge=1e-4, le=1e4)]
    views: Views
    threat_model: ThreatModelSection
    attack: TrainAttack
    pretrain: dict[SchemeName, Phase]
    regimes: dict[RegimeName, Phase]
    evaluate: EvaluationAttack
    worst_case: WorstCase
    diagnostics: Diagnostics
    corruptions: Corruptions
    similarity: Similarity
    tune: Tune
    tracking: Tracking
    runtime: Runtime
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _complete(self) -> Config:
        for key, present, names in (
            ("pretrain", self.pretrain, get_args(SchemeName)),
            ("regimes", self.regimes, get_args(RegimeName)),
        ):
            missing = [name for name in names if name not in present]
            if missing:
                raise ValueError(f"{key} lacks the section {missing[0]}; it needs {', '.join(names)}")
        radii = {"threat_model": self.threat_model.epsilon, "evaluate": self.evaluate.epsilon}
        for key, epsilon in (radii | {key: phase.epsilon for key, phase in self.phases.items()}).items():
            if self.threat_model.norm == "linf" and epsilon is not None and epsilon > 1:
                raise ValueError(
                    f"{key}.epsilon = {epsilon:g} exceeds the whole range of a pixel; "
                    "images live in [0, 1], so write 8/255 for eight grey levels"
                )
        source, models = self.similarity.source, [model_name(*one) for one in product(self.grid.schemes, self.grid.regimes, self.seeds)]
        if source != "own" and source not in models:
            raise ValueError(f"similarity.source = {source} is no model of the grid; choose from own, {', '.join(models)}")
        minimal, norm = self.diagnostics.minimal, self.threat_model.norm
        if minimal and norm not in MINIMAL_NORMS[minimal]:
            able = ", ".join(name for name, norms in MINIMAL_NORMS.items() if norm in norms)
            raise ValueError(f"diagnostics.minimal = {minimal} does not work in threat_model.norm = {norm}; choose from {able}, null")
        return self

    @model_validator(mode="after")
    def _phases(self) -> Config:
        """A value that counts twice, or not at all, would mislead whoever reads the file."""
        for key, phase in self.phases.items():
            if phase.schedule == "onecycle" and phase.warmup:
                raise ValueError(
                    f"{key}.warmup = {phase.warmup:g} doubles the warm-up of onecycle; set it to 0, or {key}.schedule = cosine"
                )
            if phase.loss == "trades" and not self.attack.random_start:
                raise ValueError(
                    f"{key}.loss = trades needs attack.random_start = true: at the image itself its divergence has no gradient to follow"
                )
        for key, name, why in ((key, name, why) for key, names in WITHOUT_EFFECT.items() for name, why in names.items()):
            if (value := getattr(self.phases[key], name)) != NEUTRAL[name]:
                raise ValueError(f"{key}.{name} = {_plain(value)} has no effect: {why}; set it to {_plain(NEUTRAL[name])}")
        return self

    @property
    def phases(self) -> dict[str, Phase]:
        """All phases by their keys, e.g. `pretrain.CL`, `regimes.Full-AT`."""
        return {f"{kind}.{name}": phase for kind in ("pretrain", "regimes") for name, phase in getattr(self, kind).items()}

    @property
    def attacked_epsilon(self) -> float:
        """The radius of `evaluate`'s attacks."""
        return self.evaluate.epsilon or self.threat_model.epsilon
