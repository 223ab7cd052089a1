"""A study and its database: nothing is lost, nothing is done twice, and what cannot be used is one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from advml.core.errors import Failure, UserError
from advml.tuning import storage
from advml.tuning import study as studies
from advml.tuning.search import Attempt, hyperband
from advml.tuning.storage import address, alone, as_failure, connect

sys.path.insert(0, str(Path(__file__).parent))
from toy_search import DEFAULT, Toy


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "log")


@pytest.fixture
def study(toy: Toy, tmp_path: Path) -> optuna.Study:
    return studies.create(toy, address(None, root=tmp_path))


def states(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    names = [trial.state.name for trial in trials]
    return {name: names.count(name) for name in sorted(set(names))}


# Trials


def test_a_search_that_starts_again_proposes_the_same(toy, run_here, fresh_database):
    first = [trial.params for trial in run_here(Toy(toy.log, name="one"), total=8)]
    second = run_here(Toy(toy.log, name="two"), total=4)
    second = run_here(Toy(toy.log, name="two"), total=8)
    assert [trial.params for trial in second] == first and first[0] == DEFAULT
    assert len({str(params) for params in first}) == 8


def test_a_death_at_any_point_of_handing_out_a_trial_leaves_nothing_running(toy, study, monkeypatch):
    far = replace(toy, far=True)

    class Died(BaseException):
        pass

    def die(*_: object) -> None:
        raise Died

    for victim in ("set_trial_param", "set_trial_user_attr"):
        with monkeypatch.context() as patch, pytest.raises(Died):
            patch.setattr(type(study._storage), victim, die)
            studies.next_trial(study, far)
            studies.next_trial(study, far)
        studies.requeue_dead(study)
        assert not studies.running(study.get_trials())
    assert states(study.get_trials()).keys() <= {"WAITING", "FAIL"}


def test_a_dead_trial_is_queued_once_and_one_at_work_is_left_alone(toy, study):
    trial = studies.next_trial(study, toy)
    studies.requeue_dead(study, alive={trial.number})
    assert states(study.get_trials()) == {"RUNNING": 1}
    study.tell(trial, state=TrialState.FAIL)  # as far as it had got when the driver was killed
    for _ in range(3):
        studies.requeue_dead(study)
    assert states(study.get_trials()) == {"FAIL": 1, "WAITING": 1}
    again = studies.next_trial(study, toy)
    assert again.params == DEFAULT and again.user_attrs[studies.ORIGIN] == trial.number
    assert again.user_attrs[studies.DEFAULT]


@pytest.mark.parametrize("gets_further", [False, True])
def test_a_trial_that_is_killed_whenever_it_runs_is_given_up_unless_it_gets_further(toy, study, monkeypatch, gets_further):
    monkeypatch.setattr(studies, "MOST_KILLS", 3)
    for epoch in range(4):
        trial = studies.next_trial(study, toy)
        if gets_further:
            trial.report(1.0, epoch)
        studies.requeue_dead(study)
    last = study.get_trials()[-1]
    if gets_further:
        assert last.state == TrialState.WAITING
    else:
        assert last.state == TrialState.FAIL and "out of memory" in last.user_attrs[studies.REASON]
        assert last.params == DEFAULT and studies.finished(study.get_trials()) == [last]


def test_trials_that_fail_are_recorded_with_their_reason_and_do_not_end_the_study(toy, run_here):
    trials = run_here(Toy(toy.log, fails="odd"), total=16)
    assert len(trials) == 16
    assert all((trial.state == TrialState.FAIL) == (trial.params["kind"] == "odd") for trial in trials)
    reasons = {trial.user_attrs[studies.REASON] for trial in trials if trial.state == TrialState.FAIL}
    assert reasons
    assert all(re.fullmatch(r"out of memory|ValueError: nothing works \(toy_search.py, line \d+\)", reason) for reason in reasons)


def test_the_winner_keeps_the_constraint(toy, run_here):
    trials = run_here(Toy(toy.log, floor=1.0), total=20)
    best = studies.ranked(trials, ("minimize",))[0]
    infeasible = [trial for trial in trials if trial.params["x"] < 1.0]
    assert min(trial.value for trial in infeasible) < best.value  # a better one was tried, and does not count
    assert best.value == min(trial.value for trial in trials if trial.params["x"] >= 1.0)


def test_the_default_is_not_pruned_by_better_trials(toy, tmp_path):
    pruned = replace(toy, make_pruner=lambda: optuna.pruners.MedianPruner(n_startup_trials=1))
    study = studies.create(pruned, address(None, root=tmp_path))
    default, *others = (studies.next_trial(study, pruned) for _ in range(4))
    for trial in others[:2]:
        assert not studies.note(trial, 1, 1.0, None)
        study.tell(trial, 1.0)
    assert studies.note(others[2], 1, 9.0, None) and not studies.note(default, 1, 9.0, None)


def test_poor_trials_are_pruned(toy, run_here):
    trials = run_here(Toy(toy.log, steps=4, make_pruner=lambda: hyperband(4)), total=20)
    assert states(trials)["PRUNED"] >= 3
    assert trials[0].state == TrialState.COMPLETE
    assert all(trial.last_step < 4 for trial in trials if trial.state == TrialState.PRUNED)


def test_two_objectives_are_searched_without_pruning(toy, run_here):
    trials = run_here(Toy(toy.log, two=True, metrics=("value", "x")), total=8)
    assert states(trials) == {"COMPLETE": 8} and all(len(trial.values) == 2 for trial in trials)


def test_a_result_that_is_no_number_fails(toy, tmp_path):
    result = Attempt({}, tmp_path).run(lambda attempt: (float("nan"),))
    assert result.state == TrialState.FAIL and "nan" in result.reason


def test_curves_of_any_length_fit_into_mysqls_columns(toy, study, tmp_path):
    records = [{"epoch": epoch, **{f"train/figure-{number}": epoch / 7 for number in range(20)}} for epoch in range(1, 301)]
    result = Attempt({}, tmp_path, history=records).run(lambda attempt: (1.0,))
    studies.finish(study, studies.next_trial(study, toy), result)
    trial = study.get_trials()[0]
    sizes = [len(json.dumps(value)) for value in trial.user_attrs.values()]
    assert sum(sizes) > 2 * 65_535 and max(sizes) < 65_535
    assert studies.history_of(trial) == records


# Studies


def test_another_space_under_the_same_name_is_refused_or_replaces(toy, tmp_path, run_here):
    run_here(toy, total=2)
    url, other = address(None, root=tmp_path), Toy(toy.log, version=1)
    with pytest.raises(UserError, match=r"--name toy-2.*--replace"):
        studies.create(other, url)
    same = studies.create(toy, url, replace=True)
    assert len(same.get_trials()) == 2
    identity = same.user_attrs[studies.IDENTITY]
    new = studies.create(other, url, replace=True)
    assert states(new.get_trials()) == {"WAITING": 1}
    assert new.user_attrs[studies.IDENTITY] != identity


def test_a_search_without_results_is_no_obstacle_to_another_of_its_name(toy, study, tmp_path):
    url, other = address(None, root=tmp_path), Toy(toy.log, version=1)
    studies.next_trial(study, toy)
    studies.requeue_dead(study)
    new = studies.create(other, url)
    assert states(new.get_trials()) == {"WAITING": 1} and new.user_attrs[studies.FINGERPRINT] == other.fingerprint()
    studies.note(studies.next_trial(new, other), 1, 2.0, None)  # the unfinished trial of a long training is a result, too
    with pytest.raises(UserError, match="--replace"):
        studies.create(toy, url)


def test_a_study_whose_creator_was_killed_is_completed(toy, tmp_path, monkeypatch):
    url = address(None, root=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "set_user_attr", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        studies.create(toy, url)
    for _ in range(2):
        assert states(studies.create(toy, url).get_trials()) == {"WAITING": 1}


def test_a_study_that_was_deleted_is_one_line(toy, study, tmp_path):
    optuna.delete_study(study_name="toy", storage=address(None, root=tmp_path))
    with pytest.raises(Failure, match="the search was deleted"), as_failure():
        study.get_trials()


# Databases


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("studies.db", "is not a database; write sqlite:///optuna.db or postgresql://user@host/name"),
        ("redis://here", "is not a database"),
        ("postgresql://me:secret@here:port/x", r"'postgresql://me:\*\*\*@here:port/x' is not a database"),
        ("sqlite://", "is not a database"),
        ("sqlite:///", "is not a database"),
        ("sqlite:///:memory:", "is not a database"),
    ],
)
def test_an_address_that_is_none_is_refused(tmp_path, url, said):
    with pytest.raises(UserError, match=rf"^--storage .*{said}"):
        address(url, root=tmp_path)


def test_a_relative_database_lies_in_the_workspace(tmp_path):
    assert address(None, root=tmp_path) == f"sqlite:///{tmp_path / 'optuna.db'}"
    assert address("sqlite:///other.db", root=tmp_path) == f"sqlite:///{tmp_path / 'other.db'}"


def test_a_server_that_cannot_be_reached_is_named_without_its_password():
    for use in (connect, lambda url: alone(url, "toy").__enter__()):
        started = time.monotonic()
        with pytest.raises(UserError, match=r"^--storage postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x .*refused") as caught:
            use("postgresql+psycopg://me:secret@127.0.0.1:1/x")
        assert "secret" not in str(caught.value) and time.monotonic() - started < 10


def test_a_file_that_cannot_be_made_or_is_no_database_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "notes").write_text("notes\n" * 1000)
    for path in ("/proc/x.db", str(tmp_path / "file" / "x.db")):
        with pytest.raises(UserError, match=rf"^--storage sqlite:///{path} "), alone(f"sqlite:///{path}", "toy"):
            pass
    with pytest.raises(UserError, match="cannot be used: file is not a database"):
        connect(f"sqlite:///{tmp_path / 'notes'}")


def test_the_driver_that_is_absent_is_named(monkeypatch):
    for url, wanted in {"mysql+pymysql": "pymysql", "mysql": "mysqlclient", "postgresql+psycopg2": "psycopg2-binary"}.items():
        said = rf"^--storage {re.escape(url)}://me:\*\*\*@h/x needs the driver \w+: pip install '{wanted}'$"
        with pytest.raises(UserError, match=said), alone(f"{url}://me:secret@h/x", "toy"):
            pass


def test_a_database_that_was_removed_leaves_nothing_to_the_next(toy, tmp_path, run_here, fresh_database):
    """SQLite keeps the last transactions in a file beside it."""
    run_here(toy, total=2)
    held = studies.create(toy, address(None, root=tmp_path))
    (tmp_path / "optuna.db").unlink()
    assert (tmp_path / "optuna.db-wal").exists()
    assert states(studies.create(toy, address(None, root=tmp_path)).get_trials()) == {"WAITING": 1}
    del held


def test_tables_that_a_kill_has_left_half_made_are_completed(toy, tmp_path, fresh_database):
    url = address(None, root=tmp_path)
    connect(url).engine.dispose()
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        for table in ("alembic_version", "version_info", "trial_values"):
            connection.execute(sqlalchemy.text(f"DROP TABLE {table}"))
    assert states(studies.create(toy, url).get_trials()) == {"WAITING": 1}


HOLD = """
import sys, time
from pathlib import Path
from advml.tuning.storage import alone
with alone(sys.argv[1], "toy"):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_second_driver_is_told_of_the_first_until_that_is_killed(tmp_path):
    url = address(None, root=tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"optuna.db .*\(process {process.pid} on .+\)"),
            alone(url, "toy"),
        ):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    for _ in range(2):
        with alone(url, "toy") as check:
            check()


@pytest.mark.parametrize(("answer", "given"), [(1, True), (0, False), (None, False)])
def test_mysqls_answer_is_heeded(monkeypatch, answer, given):
    """GET_LOCK returns 0 when another session has the lock, and NULL after an error."""
    asked, closed = [], []

    class Session:
        def execute(self, statement, *_):
            asked.append(str(statement))
            return self

        def scalar(self):
            return answer

        def close(self):
            closed.append(1)

    class Engine:
        connect = staticmethod(Session)
        url = sqlalchemy.make_url("mysql://me@h/x")

    monkeypatch.setattr(storage.sqlalchemy, "create_engine", lambda *_, **__: Engine)
    monkeypatch.setattr(storage, "_holder", lambda *_: "process 1 on host")
    if given:
        with alone("mysql://me@h/x", "toy") as check:
            assert not closed
            check()
    else:
        with pytest.raises(UserError, match=r"toy already \(process 1 on host\)"), alone("mysql://me@h/x", "toy"):
            pass
    assert "GET_LOCK" in asked[1] and closed == [1]
