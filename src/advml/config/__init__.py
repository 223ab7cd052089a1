"""The configuration: params.yaml as frozen pydantic models.

    >>> config = load("params.yaml", overrides=["threat_model.epsilon=8/255", "seeds=[0, 1, 2]"])
    >>> config.threat_model.epsilon
    0.03137254901960784
    >>> print(dump(config))          # the resolved configuration, as YAML

An unknown key, an invalid value or an impossible combination raises `UserError` with one line that names the key, the value and the
choices.
"""

from __future__ import annotations

# ruff: noqa: F401 - names of the package
from advml.config.loading import apply, changed, digest, dump, flatten, is_default, load, parse_override, parts_of, section, validate
from advml.config.phases import INHERITED, OF_THE_ATTACK, WITHOUT_EFFECT, Phase, TrainAttack
from advml.config.schema import (
    AttackSearch,
    Cluster,
    Config,
    Corruptions,
    Data,
    Diagnostics,
    EvaluationAttack,
    Grid,
    Model,
    Runtime,
    Similarity,
    ThreatModelSection,
    Tracking,
    TrainingSearch,
    Tune,
    View,
    Views,
    WorstCase,
)
from advml.config.values import CorruptionName, Section
