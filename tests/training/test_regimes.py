"""The tables of regimes and schemes, and what other files say of their rows, agree."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML

from advml.config import WITHOUT_EFFECT, Grid
from advml.config.training import OF_THE_ATTACK
from advml.names import RegimeName, SchemeName
from advml.training.regimes import REGIMES
from advml.training.schemes import SCHEMES

PIPELINE = YAML(typ="safe").load((Path(__file__).parents[2] / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PHASES = {"st": "standard_regimes", "at": "adversarial_regimes"}


def of_grid(phase: str) -> tuple[str, ...]:
    """The regimes that params.yaml may list after this pretraining."""
    (names, _) = get_args(Grid.model_fields[PHASES[phase]].annotation)
    return get_args(names)


def test_every_row_has_a_name_and_every_name_a_row():
    assert set(get_args(RegimeName)) == REGIMES.keys() and set(get_args(SchemeName)) == SCHEMES.keys()


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_a_regime_stands_in_the_grid_by_its_pretraining_and_its_stage_knows_its_attack(regime):
    """Otherwise DVC would take a model for up to date after its attack has changed."""
    assert [phase for phase in PHASES if regime.name in of_grid(phase)] == [regime.pretraining]
    assert not regime.attacked or {"threat_model", "attack"} <= set(PIPELINE[f"finetune_{regime.pretraining}"]["params"])


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_keys_that_a_regime_has_no_use_for_are_refused(regime):
    idle = {*(() if regime.attacked else OF_THE_ATTACK), *(() if regime.encoder_learns else ("layer_decay", "frozen_statistics"))}
    assert set(WITHOUT_EFFECT.get(f"regimes.{regime.name}", ())) == idle


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_keys_that_a_pretraining_has_no_use_for_are_refused(scheme):
    idle = {"frozen_statistics"} | ({"label_smoothing", "loss"} if scheme.groups else set())
    assert set(WITHOUT_EFFECT[f"pretrain.{scheme.name}"]) == idle
