"""Spaces as params.yaml writes them: what they mean, and that a bad one is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ruamel.yaml import YAML

from advml import config
from advml.config.presets import PRESETS, QUICK, preset
from advml.core.errors import UserError
from advml.core.paths import Workspace
from advml.core.provenance import source_digest
from advml.recipes import REGIMES
from advml.tuning import attack_search
from advml.tuning import space as spaces
from advml.tuning.apply import proposal
from advml.tuning.attack_search import AttackSearch
from advml.tuning.training_search import TrainingSearch

REPOSITORY = Path(__file__).parents[2]


def load(*overrides: str) -> config.Config:
    return config.load(REPOSITORY / "params.yaml", overrides)


def test_every_kind_of_range_becomes_the_distribution_of_that_kind():
    found = spaces.distributions(
        load("tune.attack.space={a: {log: [1e-4, 1/10]}, b: {float: [0, 1]}, c: {int: [5, 20]}, d: {choice: [ce, 1]}}").tune.attack.space
    )
    assert found == {
        "a": FloatDistribution(1e-4, 0.1, log=True),
        "b": FloatDistribution(0.0, 1.0),
        "c": IntDistribution(5, 20),
        "d": CategoricalDistribution(("ce", 1)),
    }


@pytest.mark.parametrize(
    ("dimension", "said"),
    [
        ("{log: [0.1, 0.01]}", "must run from low to high"),
        ("{log: [0, 1]}", "must be above 0 for a logarithmic search"),
        ("{int: [1, 2.5]}", "must hold whole numbers"),
        ("{float: [1]}", "must hold two numbers, low and high"),
        ("{float: [0, .inf]}", "must hold finite numbers"),
        ("{float: [true, 2]}", "must hold two numbers, low and high"),
        ("{choice: []}", "must hold a list in brackets"),
        ("{choice: [a, a]}", "must list plain values, each once"),
        ("{uniform: [0, 1]}", "must be one of {float: [low, high]}"),
        ("{int: [0, 1], float: [0, 1]}", "must be one of {float: [low, high]}"),
        ("0.5", "must be one of {float: [low, high]}"),
    ],
)
def test_a_range_that_is_none_is_refused_with_its_key(dimension, said):
    with pytest.raises(UserError) as caught:
        load(f"tune.finetune.space.learning_rate={dimension}")
    assert ": tune.finetune.space.learning_rate = " in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


def finetuning(root: Path, *overrides: str, regime: str = "Full-AT", scheme: str = "CL") -> TrainingSearch:
    return TrainingSearch.of(load(*overrides), root, "finetune", scheme, regime, seed=0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("label_smoothing={float: [0, 1]}", "label_smoothing = 1.0; must be at least 0 and below 1"),
        ("epochs={int: [0, 3]}", "epochs = 0 leaves the weights random"),
        ("epochs={float: [1, 3]}", "must be a whole number"),  # both of its ends are
        ("optimizer={choice: [sgd, lion]}", "optimizer = 'lion'; choose from adamw, adam, sgd"),
        ("warmup={float: [0, 0.2]}", "doubles the warm-up of onecycle"),
    ],
)
def test_what_the_configuration_would_refuse_is_refused_before_the_first_trial(made, override, said):
    with pytest.raises(UserError) as caught:
        finetuning(made, f"tune.finetune.space.{override}")
    assert str(caught.value).startswith("tune.finetune.space reaches ") and said in str(caught.value) and "\n" not in str(caught.value)
    assert not (made / "optuna.db").exists()


@pytest.mark.parametrize(
    ("kind", "which", "keys"),
    [
        ("finetune", "Full-AT", ["learning_rat", "view.shift", "temperature", "attack.steps", "threat_model.epsilon", "evaluate.steps"]),
        ("finetune", "ST", ["attack.steps"]),
        ("pretrain", "at", ["view.shif", "views.contrastive.shift", "model.projection_size", "evaluate.epsilon", "attack.steps"]),
    ],
)
def test_keys_that_are_not_of_what_is_trained_are_refused(made, kind, which, keys):
    """A trial that could change its own attack would win by it."""
    for key in keys:
        with pytest.raises(UserError, match=rf"^tune.{kind}.space .*'{key}'; .* epochs, batch_size, ") as caught:
            TrainingSearch.of(load(f"tune.{kind}.space={{{key}: {{choice: [1, 2]}}}}"), made, kind, "CL", which, seed=0)
        assert "\n" not in str(caught.value) and ("view.shift" in str(caught.value).partition(";")[2]) == (kind == "pretrain")


def test_values_that_only_clash_with_each_other_are_found(made):
    """Without `onecycle` a warm-up is fine, and without a warm-up `onecycle` is."""
    fine = "tune.finetune.space={schedule: {choice: [cosine, constant]}, warmup: {float: [0, 0.2]}}"
    assert finetuning(made, fine, "regimes.Full-AT.schedule=cosine").space.keys() == {"schedule", "warmup"}
    with pytest.raises(UserError, match=r"schedule = 'onecycle', warmup = 0.2"):
        finetuning(made, fine.replace("constant", "onecycle"), "regimes.Full-AT.schedule=cosine")


def test_an_empty_space_is_refused(made):
    with pytest.raises(UserError, match=r"^tune.finetune.space is empty"):
        finetuning(made, "tune.finetune.space={}")


def test_keys_without_effect_are_left_out_so_that_one_space_serves_all_regimes(made):
    whole = finetuning(made)
    assert "adversarial_weight" in whole.space and not whole.left_out
    heads = finetuning(made, regime="AT")
    assert "adversarial_weight" in heads.left_out and "learning_rate" in heads.space
    supervised = TrainingSearch.of(load(), made, "pretrain", "SL", "at", seed=0)
    assert "temperature" in supervised.left_out
    assert "temperature" in TrainingSearch.of(load(), made, "pretrain", "CL", "at", seed=0).space
    assert "adversarial_weight" in TrainingSearch.of(load(), made, "pretrain", "CL", "st", seed=0).left_out


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_a_fine_tuning_is_attacked_and_starts_as_the_row_of_its_regime_says(made, regime):
    search = finetuning(made, regime=regime.name)
    assert search.attacked == regime.attacked == ("adversarial_weight" in search.space)
    assert search.start_digest() == f"CL-{regime.pretraining}"


def test_a_proposal_names_the_keys_of_params_yaml(made):
    search = finetuning(made)
    assert search.proposal({"learning_rate": 0.1, "attack_steps": 3}) == {
        "regimes.Full-AT.learning_rate": 0.1,
        "regimes.Full-AT.attack_steps": 3,
    }
    pretraining = TrainingSearch.of(load(), made, "pretrain", "CL", "at", seed=0)
    assert pretraining.proposal({"epochs": 3, "view.shift": 0.1, "temperature": 0.1}) == {
        "pretrain.CL.epochs": 3,
        "views.contrastive.shift": 0.1,
        "temperature": 0.1,
    }


def test_the_search_starts_from_the_default_also_where_a_phase_takes_over_values_of_the_study(made):
    space = "tune.finetune.space={epsilon: {float: [0.05, 0.2]}, attack_steps: {int: [2, 9]}, learning_rate: {log: [1e-4, 1]}}"
    assert finetuning(made, space).default() == {"epsilon": 0.15, "attack_steps": 5, "learning_rate": 2e-3}
    outside = finetuning(made, "tune.finetune.space={learning_rate: {log: [0.1, 1]}}")
    assert outside.missed()


def test_what_a_study_is_of_is_in_its_name_and_in_its_fingerprint(made):
    search = finetuning(made)
    assert search.name == "finetune-CL-Full-AT-s0"
    assert AttackSearch.of(load(), made, "CL-AT-s0").name == "attack-CL-AT-s0"
    same = finetuning(made, "tracking.experiment=other", "tune.finetune.trials=99", "pretrain.SL.epochs=3")
    others = [
        finetuning(made, "tune.finetune.space.learning_rate={log: [1e-3, 1e-2]}"),
        finetuning(made, "tune.finetune.clean_floor=0.5"),
        finetuning(made, "regimes.Full-AT.batch_size=64"),
        finetuning(made, "attack.steps=9"),
        finetuning(made, "evaluate.steps=9"),
    ]
    prints = {other.fingerprint() for other in (search, *others)}
    assert same.fingerprint() == search.fingerprint() and len(prints) == 6
    (made / "models/pretrain/CL-at-s0/model.json").write_text('{"digest": "3", "data": {"digest": "2"}}')
    assert finetuning(made).fingerprint() not in prints


@pytest.mark.parametrize(
    ("record", "remedy"), [({"regime": "AT"}, "advml train CL AT"), ({"phase": "at"}, "advml pretrain CL at"), ({}, "choose a model")]
)
def test_a_model_of_other_data_is_refused_before_anything_is_created(made, record, remedy):
    before = {*made.rglob("*")}
    origin = {"scheme": "CL", "seed": 0} if record else {}
    for folder, build in (
        ("finetune/CL-AT-s0", lambda: AttackSearch.of(load(), made, "CL-AT-s0")),
        ("pretrain/CL-at-s0", lambda: finetuning(made)),
    ):
        (made / "models" / folder / "model.json").write_text(json.dumps({"digest": "1", "data": {"digest": "3"}, **origin, **record}))
        with pytest.raises(UserError, match=rf"models/{folder} was .*{remedy}"):
            build()
    assert {*made.rglob("*")} == before


OWN = {"objective": "margin", "momentum": 0.75, "schedule": "cosine", "keep": "last", "random_start": False, "restarts": 2}


def test_the_default_of_an_attack_search_is_the_attack_of_evaluate_whatever_it_is(made):
    search = AttackSearch.of(load(*(f"evaluate.{key}={value}" for key, value in OWN.items())), made, "CL-AT-s0")
    assert {key: search.default()[key] for key in OWN} == OWN and search.attack({})["steps"] == 20
    own = load(*(f"evaluate.{key}={value}" for key, value in OWN.items()), "evaluate.step_size=0.03")
    search = AttackSearch.of(own, made, "CL-AT-s0")
    assert not search.missed()
    assert search.default()["step_size"] == pytest.approx(0.2)
    assert config.changed(own, search.proposal({})).evaluate == own.evaluate


@pytest.mark.parametrize(
    "override", ["tune.attack.seed=1", "evaluate.seed=1", "evaluate.steps=21", *(f"evaluate.{key}={value}" for key, value in OWN.items())]
)
def test_whatever_changes_the_default_attack_or_its_random_numbers_makes_another_study(made, override):
    before, after = (AttackSearch.of(load(*given), made, "CL-AT-s0").fingerprint() for given in ((), (override,)))
    assert before != after


def test_other_code_of_attacks_makes_another_study(made, monkeypatch):
    before = AttackSearch.of(load(), made, "CL-AT-s0").fingerprint()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + (b"#" if path.name == "pgd.py" else b""))
    source_digest.cache_clear()
    assert AttackSearch.of(load(), made, "CL-AT-s0").fingerprint() != before
    monkeypatch.undo()
    source_digest.cache_clear()
    assert AttackSearch.of(load(), made, "CL-AT-s0").fingerprint() == before


CASES = [(name, protocol) for name, protocols in PRESETS.items() for protocol in protocols] + [(name, "quick") for name in QUICK]


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_every_preset_can_be_searched(made, name, protocol):
    """Its spaces are valid, and the one of attacks fits the budget of the preset's own evaluation."""
    text = preset(name, quick=True) if protocol == "quick" else preset(name, protocol=protocol)
    loaded = config.validate(YAML(typ="safe", pure=True).load(text))
    AttackSearch.of(loaded, made, "CL-AT-s0")
    TrainingSearch.of(loaded, made, "finetune", "CL", "Full-AT", seed=0)
    for phase in ("st", "at"):
        TrainingSearch.of(loaded, made, "pretrain", "CL", phase, seed=0)


def test_a_budget_without_a_step_for_every_restart_is_refused(made):
    with pytest.raises(UserError, match=r"^tune.attack.budget = 2 .*evaluate.restarts = 3$"):
        AttackSearch.of(load("tune.attack.budget=2", "evaluate.restarts=3"), made, "CL-AT-s0")


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("most", [3, 12, 20, 100])
def test_no_attack_takes_more_passes_than_the_default_and_one_step_more_would(made, keep, own, most):
    search = AttackSearch.of(
        load(f"tune.attack.budget={most}", f"evaluate.restarts={own}", "tune.attack.space={momentum: {float: [0, 1]}}"), made, "CL-AT-s0"
    )
    assert search.attack({})["steps"] == most // own
    for restarts in range(1, 9):
        steps = search.attack({"restarts": restarts, "keep": keep})["steps"]
        assert sum(attack_search.passes(steps=steps, restarts=restarts, keep=keep).values()) <= search.passes or not steps
        assert sum(attack_search.passes(steps=steps + 1, restarts=restarts, keep=keep).values()) > search.passes


def test_nothing_to_learn_and_nothing_to_start_from_are_said(made):
    with pytest.raises(UserError, match=r"^SL .*AT"):
        finetuning(made, scheme="SL", regime="AT")
    with pytest.raises(UserError, match=r"advml pretrain SCL at --seed 0$"):
        finetuning(made, scheme="SCL")
    with pytest.raises(UserError, match=r"'nobody'.* CL-AT-s0$"):
        AttackSearch.of(load(), made, "nobody")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("restart={choice: [1, 2]}", "unknown key 'restart'; choose from step_size, schedule, momentum"),
        ("objective={choice: [ce, kl]}", "objective = 'kl'; choose from ce, margin, dlr"),
        (
            "restarts={choice: [1, 99]}",
            "restarts = 99 leave none of them a step within the budget's 42 forward and backward passes; "
            "reduce tune.attack.space.restarts, or raise evaluate.steps",
        ),
        ("step_size={float: [-1, 1]}", "step_size = -1.0"),
    ],
)
def test_an_attack_that_cannot_be_is_refused_before_the_first_trial(made, override, said):
    with pytest.raises(UserError) as caught:
        AttackSearch.of(load(f"tune.attack.space.{override}"), made, "CL-AT-s0")
    assert str(caught.value).startswith("tune.attack.space reaches ") and said in str(caught.value)


def test_a_proposed_attack_keeps_to_the_budget_and_to_what_params_yaml_allows(made):
    search = AttackSearch.of(load(), made, "CL-AT-s0")
    values = {"restarts": 4, "random_start": False, "step_size": 2.0, "momentum": 0.5, "schedule": "linear", "objective": "dlr"}
    found = search.proposal(values)
    assert (found["evaluate.steps"], found["evaluate.restarts"]) == (4, 4) and "evaluate.keep" not in found  # 4 * (4 + 2 + 4) <= 42
    assert search.proposal(values | {"keep": "last"})["evaluate.keep"] == "last"
    assert found["evaluate.step_size"] == 0.3
    assert config.changed(load(), found).evaluate.objective == "dlr" and found["evaluate.random_start"] is False
    assert search.default()["step_size"] * 0.15 == pytest.approx(2.5 * 0.15 / 20)


@pytest.mark.parametrize("name", ["../..", "..", ".", "", "a/b", "/tmp", "-x", ".x", "a b", "a\n", "ä"])
def test_a_name_that_could_leave_its_folder_is_refused_before_anything_starts(made, name):
    asked = [
        lambda: AttackSearch.of(load(), made, "CL-AT-s0", name=name),
        lambda: TrainingSearch.of(load(), made, "finetune", "CL", "Full-AT", seed=0, name=name),
        lambda: TrainingSearch.of(load(), made, "pretrain", "CL", "at", seed=0, name=name),
    ]
    for ask in asked if name else ():  # without a name the study has one of its own
        with pytest.raises(UserError, match=r"^--name "):
            ask()
    with pytest.raises(UserError, match=r"letters, digits"):
        proposal(Workspace(made), name)
    assert AttackSearch.of(load(), made, "CL-AT-s0", name="v1.2_a-b").name == "v1.2_a-b"
