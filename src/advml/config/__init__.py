"""params.yaml as frozen pydantic models: the one source of every parameter.

    >>> config = load("params.yaml", overrides=["threat_model.epsilon=8/255", "seeds=[0, 1, 2]"])
    >>> config.threat_model.epsilon
    0.03137254901960784
    >>> print(dump(config))          # the resolved configuration, as YAML

An unknown key, a wrong value or a combination that cannot work raises `UserError` with one line that
names the key, the value and the choices.
"""

from __future__ import annotations

from advml.config.evaluation import Corruptions, Diagnostics, EvaluationAttack, Similarity, WorstCase
from advml.config.loading import apply, changed, digest, dump, flatten, load, parse_override, parts_of, validate
from advml.config.search import AttackSearch, TrainingSearch, Tune
from advml.config.study import Cluster, Data, Grid, Model, Runtime, ThreatModelSection, Tracking
from advml.config.training import NEUTRAL, OF_THE_ATTACK, WITHOUT_EFFECT, Phase, TrainAttack, View, Views
from advml.config.values import Section
from advml.config.whole import Config
from advml.names import CorruptionName, PhaseName, RegimeName, SchemeName

__all__ = [
    # params.yaml and its sections
    "Config",
    "Section",
    "Grid",
    "Data",
    "Model",
    "ThreatModelSection",
    "View",
    "Views",
    "TrainAttack",
    "Phase",
    "EvaluationAttack",
    "WorstCase",
    "Diagnostics",
    "Corruptions",
    "Similarity",
    "Tune",
    "AttackSearch",
    "TrainingSearch",
    "Tracking",
    "Runtime",
    "Cluster",
    # names to choose from
    "SchemeName",
    "RegimeName",
    "PhaseName",
    "CorruptionName",
    # what a phase may have no use for
    "NEUTRAL",
    "OF_THE_ATTACK",
    "WITHOUT_EFFECT",
    # reading, checking, changing, printing
    "load",
    "apply",
    "parse_override",
    "parts_of",
    "validate",
    "changed",
    "dump",
    "flatten",
    "digest",
]
