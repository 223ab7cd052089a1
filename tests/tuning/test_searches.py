"""What the searches of `advml tune` ask of Optuna, and what is said when they find nothing. A search upside down runs as well as any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from advml import config
from advml.cli import tune as tune_command
from advml.cli.tune import result_lines
from advml.core.errors import Failure, UserError
from advml.tracking import store as stores
from advml.tuning import command
from advml.tuning import study as studies
from advml.tuning.attack_search import AttackSearch
from advml.tuning.command import Outcome
from advml.tuning.training_search import TrainingSearch

REPOSITORY = Path(__file__).parents[2]


def search(root: Path, kind: str, which: str = "", **options):
    """One of the real searches under params.yaml."""
    loaded = config.load(REPOSITORY / "params.yaml")
    if kind == "attack":
        return AttackSearch.of(loaded, root, "CL-AT-s0", **options)
    return TrainingSearch.of(loaded, root, kind, "CL", which, seed=0, **options)


@pytest.mark.parametrize(
    ("kind", "which", "pareto", "directions", "pruner"),
    [
        ("attack", "", False, ("minimize",), optuna.pruners.WilcoxonPruner),
        ("finetune", "Full-AT", False, ("maximize",), optuna.pruners.HyperbandPruner),
        ("finetune", "Full-AT", True, ("maximize", "maximize"), optuna.pruners.NopPruner),
        ("pretrain", "st", False, ("maximize",), optuna.pruners.HyperbandPruner),
        ("pretrain", "at", True, ("maximize", "maximize"), optuna.pruners.NopPruner),
    ],
)
def test_an_attack_is_to_leave_little_and_a_training_to_keep_much(made, kind, which, pareto, directions, pruner):
    chosen = search(made, kind, which, **({"pareto": True} if pareto else {}))
    assert chosen.directions == directions and len(chosen.metrics) == len(directions) and chosen.metrics[0] == "robust"
    assert type(chosen.pruner()) is pruner and type(chosen.sampler(0)) is optuna.samplers.TPESampler
    assert chosen.sampler(2**40)._rng.rng.random() != chosen.sampler(1)._rng.rng.random()  # from the seed, of any size


def test_hyperbands_resource_is_the_epoch_and_its_largest_that_of_the_space(made):
    chosen = search(made, "finetune", "Full-AT")
    pruner = chosen.pruner()
    assert pruner._max_resource == 15 and (pruner._min_resource, pruner._reduction_factor) == (1, 3)


@pytest.mark.parametrize(("direction", "better", "worse"), [("minimize", 0.1, 0.9), ("maximize", 0.9, 0.1)])
def test_pruners_stop_the_worse_and_spare_the_better(made, direction, better, worse):
    """What is reported, the direction and the pruner of each search go together."""
    chosen = search(made, "attack") if direction == "minimize" else search(made, "finetune", "Full-AT")
    assert chosen.directions == (direction,)

    def share_stopped(value: float) -> float:
        study = optuna.create_study(study_name="s", direction=direction, pruner=chosen.pruner())
        stopped, drift = 0, (1 if better > worse else -1) * 1e-6  # each a little better than the one before: no ties
        for number in range(20):
            trial, mine = study.ask(), value if number >= 10 else 0.5
            for step in range(6) if direction == "minimize" else (1, 3, 9):
                trial.report(mine + step / 1000 + number * drift, step)
                if trial.should_prune():
                    stopped += number >= 10
                    study.tell(trial, state=TrialState.PRUNED)
                    break
            else:
                study.tell(trial, mine)
        return stopped / 10

    assert share_stopped(worse) >= 0.3 and share_stopped(better) <= 0.3


def outcome(trials: list, directions=("maximize",)) -> Outcome:
    return Outcome(Path("reports"), trials, studies.best_of(trials, directions), None, [])


def ended(state: TrialState, reason: str | None = None, violation: float | None = None):
    return create_trial(
        state=state,
        values=[0.5] if state == TrialState.COMPLETE else None,
        user_attrs={studies.REASON: reason} if reason else {},
        constraints=None if violation is None else {"clean_floor": violation},
    )


def test_an_mlflow_server_that_is_down_or_refuses_is_said_before_the_search_begins(made, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(command, "tune", lambda *_, **__: begun.append(capsys.readouterr().err) or outcome([]))

    def run(uri: str) -> None:
        chosen = search(made, "attack")
        asked = replace(chosen, config=config.changed(chosen.config, {"tracking.uri": uri}))
        tune_command.run(asked, trials=1, workers=1, cluster=None, storage=None, replace=False)

    with pytest.raises(Failure, match="was completed"):
        run("http://127.0.0.1:9")
    assert begun[0].count("warning: no tracking, http://127.0.0.1:9") == 1

    def refuse(place: stores.Place) -> None:
        raise stores.Denied(f"MLflow at {place.uri} refuses user or password")

    monkeypatch.setattr(stores, "connect", refuse)
    with pytest.raises(UserError, match="refuses user or password"):
        run("http://127.0.0.1:10")
    assert len(begun) == 1


@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_a_floor_that_nothing_keeps_is_named_by_its_key_whatever_the_study_is_called(made, kind):
    chosen = search(made, kind, {"finetune": "Full-AT", "pretrain": "at"}[kind], name="mystudy")
    missed = [ended(TrialState.COMPLETE, violation=0.1)]
    with pytest.raises(UserError, match=rf"^no trial of mystudy .*tune\.{kind}\.clean_floor"):
        result_lines(outcome(missed), chosen)


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([(TrialState.FAIL, "first"), (TrialState.FAIL, "out of memory")], "all 2 trials failed, the last one: out of memory"),
        ([(TrialState.FAIL, "nan"), (TrialState.PRUNED, None)], "1 of 2 trials failed, others were pruned, the last one: nan"),
        ([(TrialState.PRUNED, None)], "none of 1 trials was completed"),
    ],
)
def test_where_no_trial_has_run_to_its_end_the_reason_is_said_and_no_floor_blamed(made, trials, said):
    with pytest.raises(Failure, match=f"^mine: {said}$"):
        result_lines(outcome([ended(*one) for one in trials]), search(made, "finetune", "Full-AT", name="mine"))


def told_last(search, *trials: tuple[float, int], confirmed: dict | None = None, violation: float = 0.0) -> str:
    """Last line of a search's output; of each trial its value and a parameter, the first is the default's."""
    default = {"user_attrs": {studies.DEFAULT: True}, "constraints": {"clean_floor": violation}}
    made = [
        create_trial(
            values=[value], params={"epochs": epochs}, distributions={"epochs": IntDistribution(1, 9)}, **({} if number else default)
        )
        for number, (value, epochs) in enumerate(trials)
    ]
    best = studies.best_of(made, search.directions)
    return result_lines(Outcome(Path("reports"), made, best, confirmed, []), search)[-1]


def test_a_winner_that_is_the_default_or_not_better_on_validation_is_not_to_be_applied(made):
    attack, training = search(made, "attack"), search(made, "finetune", "Full-AT")
    for chosen, better, worse in ((attack, 0.4, 0.6), (training, 0.6, 0.4)):
        assert told_last(chosen, (0.5, 1), (better, 2)) == f"next: advml tune apply {chosen.name}"
        for others in ([], [(worse, 2)], [(0.5, 2)], [(better, 1)]):
            assert told_last(chosen, (0.5, 1), *others).startswith("nothing to apply: ")
    for gain, said in ((0.01, "next: "), (-0.01, "nothing to apply: ")):
        robust = {"mean": gain}
        split = {"default": {}, "winner": {}, "difference": {"robust": robust}, "beats_default": None}
        assert told_last(training, (0.5, 1), (0.6, 2), confirmed={"confirmed": {"validation": split, "test": split}}).startswith(said)
    assert told_last(training, (0.5, 1), (0.4, 2), violation=0.1).startswith("next: ")  # the default is below the floor
