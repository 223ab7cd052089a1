"""The parameters by which runs compare."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from advml import config as configuration
from advml.recipes import REGIMES, SCHEMES
from advml.tracking.parameters import comparable

PHASE = "{epochs: 1, batch_size: 8, optimizer: adam, learning_rate: 0.1, weight_decay: 0, schedule: constant}"
PARAMS = Path(__file__).parents[2] / "params.yaml"


def record_of(scheme: str, regime: str, *overrides: str) -> dict:
    """What is known of a model of the digits study once it is measured, with the sections that its training reads."""
    whole = configuration.load(PARAMS, overrides).model_dump(mode="json")
    kept = {key: whole[key] for key in ("model", "temperature", "views", "threat_model", "attack", "evaluate")}
    kept["pretrain"] = {scheme: whole["pretrain"][scheme]}
    kept |= {"regimes": {regime: whole["regimes"][regime]}} if REGIMES[regime].finetunes(SCHEMES[scheme]) else {}
    return {"kind": "model", "scheme": scheme, "regime": regime, "seed": 0, "parameters": kept}


def test_models_share_names_and_the_first_that_differ_tell_scheme_and_regime():
    shown = [comparable(record_of(scheme, regime)) for scheme, regime in product(("SL", "CL", "SCL"), REGIMES)]
    assert {"scheme", "regime", "seed", "backbone", "epsilon", "training.pretrain.epochs", "training.finetune.epochs"} <= set.intersection(
        *map(set, shown)
    )
    names = set().union(*shown)
    assert max(map(len, shown)) <= 25 and len(names) <= 26
    differing = sorted(name for name in names if len({str(each.get(name)) for each in shown}) > 1)
    assert differing[:2] == ["regime", "scheme"]  # MLflow's Compare view opens on the first in alphabetical order


@pytest.mark.parametrize(
    ("scheme", "regime", "pretraining", "finetuning"),
    [("SL", "ST", (0, 0), (0, 0)), ("CL", "AT", (0.15, 5), (0, 0)), ("SCL", "Full-AT", (0.15, 5), (0.15, 5))],
)
def test_a_phase_without_attack_has_the_radius_zero(scheme, regime, pretraining, finetuning):
    shown = comparable(record_of(scheme, regime))
    for phase, expected in {"pretrain": pretraining, "finetune": finetuning}.items():
        assert (shown[f"training.{phase}.epsilon"], shown[f"training.{phase}.attack_steps"]) == expected
    assert (shown["training.finetune.epochs"] == 0) == ((scheme, regime) == ("SL", "ST"))  # its pretraining is all


def test_settings_with_a_neutral_value_are_told_where_they_have_another():
    assert "training.finetune.loss" not in comparable(record_of("CL", "Full-AT"))
    overrides = ("regimes.Full-AT.loss=trades", "regimes.Full-AT.epsilon=0.2", "attack.step_size=0.1", "evaluate.epsilon=0.1")
    shown = comparable(record_of("CL", "Full-AT", *overrides))
    assert shown["training.finetune.loss"] == "trades" and shown["training.attack.step_size"] == 0.1
    assert (shown["epsilon"], shown["training.pretrain.epsilon"], shown["training.finetune.epsilon"]) == (0.1, 0.15, 0.2)
    assert shown["training.pretrain.views"] == "rotation 20.0, scale [0.8, 1.2], shift 0.15, brightness 0.4"


@pytest.mark.parametrize(("scheme", "has"), [("SL", False), ("CL", True), ("EMP", False), ("CLxSL", True)])
def test_a_temperature_is_told_of_schemes_whose_loss_has_one(scheme, has):
    shown = comparable(record_of(scheme, "AT", f"pretrain.{scheme}={PHASE}"))
    assert ("training.pretrain.temperature" in shown) == has


def test_the_views_of_both_terms_of_a_hybrid_are_told():
    shown = comparable(record_of("CLxSL", "AT", f"pretrain.CLxSL={PHASE}", "views.supervised.shift=0.25"))["training.pretrain.views"]
    assert "shift 0.25" in shown and "shift 0.15" in shown


def test_a_search_tells_all_that_it_has():
    assert comparable({"kind": "search", "parameters": {"tune": {"attack": {"trials": 8}}}}) == {"tune.attack.trials": 8}
