"""Logged parameters: about twenty, under names that all models share, so that any two runs compare.

MLflow sorts names, and its Compare view opens on the first parameters that differ: what tells models apart must come before the
settings of the phases, hence `training.` in front of `pretrain.` and `finetune.`. The whole configuration is an artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advml.config import INHERITED, flatten, schema
from advml.recipes import REGIMES, SCHEMES

Record = Mapping[str, Any]
STRENGTH = {key: INHERITED[key].split(".") for key in ("epsilon", "attack_steps")}  # key of a phase -> section and key that replace null
NONE = dict.fromkeys(("epochs", *STRENGTH), 0)  # parameters of a phase without training


def comparable(record: Record) -> dict[str, Any]:
    """Parameters of a run under shared names; for searches and trials, all of theirs.

    An attack that a phase does not have has the radius 0 and 0 steps. Of settings with a neutral value only others are told.

    Args:
        record: `kind`, `parameters` as in params.yaml, and of a model `scheme`, `regime` or `phase`, and `seed`.
    """
    parameters = record.get("parameters") or {}
    if record.get("kind") in ("search", "trial"):
        return flatten(parameters)
    shown = {key: record[key] for key in ("scheme", "regime", "seed") if key in record}
    shown |= {"seeds": parameters["seeds"]} if "seeds" in parameters else {}
    if model := parameters.get("model"):
        shown |= {"backbone": model["backbone"]} | {f"model.{key}": value for key, value in _chosen(schema.Model, model).items()}
    if "evaluate" in parameters and (threat := parameters.get("threat_model")):  # the evaluation's attack
        shown |= {"epsilon": parameters["evaluate"].get("epsilon") or threat["epsilon"], "norm": threat["norm"]}
    scheme, regime = record.get("scheme", ""), REGIMES.get(record.get("regime", ""))
    phase = (parameters.get("pretrain") or {}).get(scheme)
    if phase is None:
        return shown
    mode = regime.pretraining if regime else record.get("phase")
    pretraining = _phase(phase, parameters, attacked=mode == "at") | _views(scheme, parameters)
    shown |= {f"training.pretrain.{key}": value for key, value in pretraining.items()}
    shown |= {f"training.attack.{key}": value for key, value in _chosen(schema.TrainAttack, parameters.get("attack") or {}).items()}
    if regime:
        finetuning = (parameters.get("regimes") or {}).get(record["regime"])
        shown |= {f"training.finetune.{key}": value for key, value in _phase(finetuning, parameters, attacked=regime.attacked).items()}
    return shown


def _phase(phase: Record | None, parameters: Record, *, attacked: bool) -> dict[str, Any]:
    if phase is None:
        return NONE
    always = {key: phase[key] for key, field in schema.Phase.model_fields.items() if field.is_required() and key in phase}
    stand_ins = {key: phase.get(key) or (parameters.get(at) or {}).get(name) for key, (at, name) in STRENGTH.items()}
    return always | _chosen(schema.Phase, phase) | (stand_ins if attacked else dict.fromkeys(stand_ins, 0))


def _views(scheme: str, parameters: Record) -> dict[str, Any]:
    """Parameters of the contrastive objective and of random views, one line for each kind of views."""
    row = SCHEMES.get(scheme)
    shown = {"temperature": parameters["temperature"]} if row and row.has_temperature and "temperature" in parameters else {}
    views = dict.fromkeys(part.view for part in row.parts) if row else ()
    told = [view for name in views if (view := (parameters.get("views") or {}).get(name))]
    lines = [", ".join(f"{key} {value}" for key, value in _chosen(schema.View, view).items()) for view in told]
    return shown | ({"views": "; ".join(dict.fromkeys(lines))} if lines else {})


def _chosen(section: type[schema.Section], values: Record) -> dict[str, Any]:
    """Settings that differ from their neutral values."""
    fields = {key: field for key, field in section.model_fields.items() if key in values and not field.is_required()}
    return {key: values[key] for key, field in fields.items() if values[key] != _plain(field.get_default(call_default_factory=True))}


def _plain(value: Any) -> Any:
    """Value formatted as in JSON."""
    return list(value) if isinstance(value, tuple) else value
