"""Studies run by real worker processes, some of them killed: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import psutil
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from advml.errors import Failure, UserError
from advml.runtime import processes
from advml.tuning import census, locking, patience, supervisor, worker
from advml.tuning import study as studies
from advml.tuning.locking import lock, reach
from advml.tuning.patience import StorageGone
from advml.tuning.storage import address, connect
from advml.tuning.turn import Turn

sys.path.insert(0, str(Path(__file__).parent))
from toy_search import DEFAULT, SPACE, Toy, hyperband


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "log")


def started(toy: Toy) -> list[int]:
    """Numbers of the trials that ran, in order."""
    return [int(line.split()[0]) for line in toy.log.read_text().splitlines()]


def states(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    names = [trial.state.name for trial in trials]
    return {name: names.count(name) for name in sorted(set(names))}


# Every trial once


def test_four_workers_on_a_fresh_database_run_every_trial_once(toy, run, fresh_database):
    trials = run(toy, total=16, workers=4)
    assert states(trials) == {"COMPLETE": 16}
    assert sorted(started(toy)) == list(range(16))
    assert trials[0].params == DEFAULT and census.default_of(trials).number == 0
    assert len({str(trial.params) for trial in trials}) == 16  # no two workers draw the same numbers


def test_the_number_of_trials_is_a_total_over_repeated_commands(toy, run):
    assert len(run(toy, total=3)) == 3
    assert len(run(toy, total=5, workers=2)) == 5
    assert len(run(toy, total=5)) == 5
    assert len(run(toy, total=2)) == 5
    assert sorted(started(toy)) == list(range(5))


def test_the_same_command_in_two_places_keeps_to_one_total(toy, tmp_path, run, fresh_database):
    """As on two machines that share a database."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from toy_search import Toy
from advml.tuning import study, supervisor, worker
supervisor.PRELOADED = ["advml.tuning.study", "advml.tuning.supervisor", "advml.tuning.worker"]
if __name__ == "__main__":
    toy = Toy(Path({str(toy.log)!r}), pause=0.01)
    url = {address(None, root=tmp_path)!r}
    opened = study.create(toy.definition(), url)
    orders = worker.Orders(toy, url, 16, 0, 7, Path({str(tmp_path / "elsewhere")!r}))
    supervisor.supervise(opened, orders, workers=2, watch=lambda trials: None)
"""
    script = tmp_path / "elsewhere.py"
    script.write_text(code)
    other = subprocess.Popen([sys.executable, str(script)])
    trials = run(Toy(toy.log, pause=0.01), total=16, workers=2)
    assert other.wait(60) == 0
    assert states(trials) == {"COMPLETE": 16} and sorted(started(toy)) == list(range(16))


def test_a_search_that_starts_again_proposes_the_same(toy, run_here):
    first = [trial.params for trial in run_here(Toy(toy.log, name="one"), total=8)]
    second = run_here(Toy(toy.log, name="two"), total=4)
    second = run_here(Toy(toy.log, name="two"), total=8)
    assert [trial.params for trial in second] == first


# Kills


def test_a_study_whose_workers_are_killed_at_random_finishes_every_trial(toy, run):
    random_numbers, killed, last = random.Random(0), [], [time.monotonic()]

    def kill(trials: Sequence[FrozenTrial]) -> None:
        victims = [trial for trial in census.running(trials) if census.pid_of(trial)]
        if victims and len(killed) < 12 and time.monotonic() - last[0] > 0.25:
            with contextlib.suppress(ProcessLookupError):  # it has ended since the trials were read
                os.kill(census.pid_of(random_numbers.choice(victims)), signal.SIGKILL)
                killed.append(1)
                last[0] = time.monotonic()

    trials = run(Toy(toy.log, pause=0.03), total=40, workers=4, watch=kill)
    finished = census.finished(trials)
    assert len(killed) == 12
    assert len(finished) == 40 and states(finished) == {"COMPLETE": 40}
    assert not [trial for trial in trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
    for trial in trials:  # whoever was killed had its parameters tried again, by one trial and no more
        again = [other for other in trials if other.user_attrs.get(census.RETRY_OF) == trial.number]
        assert len(again) == census.is_killed(trial)
        assert all(other.params == trial.params for other in again)


def test_a_trial_that_the_whole_command_died_with_is_taken_up_by_the_next(toy, tmp_path, run):
    url = address(None, root=tmp_path)
    study = studies.create(toy.definition(), url)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        studies.claim(studies.join(toy.definition(), url), toy.definition(), url, total=9, since=0, seed=0)
        os.write(write, b"x")
        signal.pause()
        os._exit(0)
    os.read(read, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert states(study.get_trials()) == {"RUNNING": 1}
    trials = run(toy, total=3)
    assert states(trials) == {"COMPLETE": 3, "FAIL": 1}
    assert census.is_killed(trials[0]) and trials[1].params == DEFAULT and census.default_of(trials).number == 1


def test_a_death_at_any_point_of_handing_out_a_trial_leaves_nothing_running(toy, tmp_path, monkeypatch):
    url = address(None, root=tmp_path)
    definition = replace(toy.definition(), default=None)
    study = studies.create(definition, url)

    class Died(BaseException):
        pass

    def die(*_: object) -> None:
        raise Died

    for victim in ("set_trial_param", "record_heartbeat", "set_trial_user_attr"):
        with monkeypatch.context() as patch, pytest.raises(Died):
            patch.setattr(type(study._storage), victim, die)
            studies.claim(study, definition, url, total=99, since=0, seed=0)
        studies.bury(study, url)
        assert not census.running(study.get_trials())
    assert all(trial.state in (TrialState.WAITING, TrialState.FAIL) for trial in study.get_trials())


def test_burying_twice_or_after_dying_halfway_queues_a_trial_once(toy, tmp_path):
    url = address(None, root=tmp_path)
    definition = toy.definition()
    study = studies.create(definition, url)
    trial = studies.claim(study, definition, url, total=9, since=0, seed=0)
    study.tell(trial, state=TrialState.FAIL)  # as far as a burial had got when it was killed
    for _ in range(3):
        studies.bury(study, url)
    assert states(study.get_trials()) == {"FAIL": 1, "WAITING": 1}


def test_a_live_trial_is_not_buried(toy, tmp_path):
    url = address(None, root=tmp_path)
    definition = toy.definition()
    study = studies.create(definition, url)
    studies.claim(study, definition, url, total=9, since=0, seed=0)
    studies.bury(study, url)
    assert states(study.get_trials()) == {"RUNNING": 1}


def test_a_trial_of_a_machine_that_is_gone_is_taken_up_when_its_heartbeats_stop(toy, tmp_path, monkeypatch):
    url = address(None, root=tmp_path)
    definition = toy.definition()
    study = studies.create(definition, url)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "machine", lambda: "elsewhere:1")
        studies.claim(study, definition, url, total=9, since=0, seed=0)
    studies.bury(study, url)
    assert states(study.get_trials()) == {"RUNNING": 1}
    study._storage._backend.heartbeat_interval, study._storage._backend.grace_period = 1, 1
    time.sleep(2.1)  # the database counts in seconds
    studies.bury(study, url)
    assert states(study.get_trials()) == {"FAIL": 1, "WAITING": 1}


def test_a_trial_that_is_killed_whenever_it_runs_is_given_up_with_a_reason(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "MOST_KILLS", 3)
    url = address(None, root=tmp_path)
    definition = toy.definition()
    study = studies.create(definition, url)
    for _ in range(studies.MOST_KILLS + 1):
        study.tell(studies.claim(study, definition, url, total=99, since=0, seed=0), state=TrialState.FAIL)
        studies.bury(study, url)
    last = study.get_trials()[-1]
    assert last.state == TrialState.FAIL and "want of memory" in last.user_attrs[census.REASON]
    assert last.params == DEFAULT and census.finished(study.get_trials()) == [last]


def test_a_trial_that_gets_further_every_time_is_never_given_up(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "MOST_KILLS", 3)
    url = address(None, root=tmp_path)
    definition = toy.definition()
    study = studies.create(definition, url)
    for epoch in range(2 * studies.MOST_KILLS):
        trial = studies.claim(study, definition, url, total=99, since=0, seed=0)
        trial.report(1.0, epoch)
        study.tell(trial, state=TrialState.FAIL)
        studies.bury(study, url)
    assert study.get_trials()[-1].state == TrialState.WAITING


def test_workers_end_when_their_command_is_killed(toy, tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from toy_search import Toy
from advml.tuning import study, supervisor, worker
supervisor.PRELOADED = ["advml.tuning.study", "advml.tuning.supervisor", "advml.tuning.worker"]
if __name__ == "__main__":
    toy = Toy(Path({str(toy.log)!r}), pause=60)
    url = {address(None, root=tmp_path)!r}
    orders = worker.Orders(toy, url, 2, 0, 0, Path({str(tmp_path)!r}))
    supervisor.supervise(study.create(toy.definition(), url), orders, workers=2, watch=lambda trials: None)
"""
    script = tmp_path / "command.py"
    script.write_text(code)
    command = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    while not toy.log.exists() or len(toy.log.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.kill()
    command.wait()
    pids = [int(line.split()[1]) for line in toy.log.read_text().splitlines()]
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "a worker has outlived its command"
        time.sleep(0.05)


# Failures


def test_trials_that_fail_are_recorded_with_their_reason_and_do_not_end_the_study(toy, run_here):
    trials = run_here(Toy(toy.log, fails="odd"), total=16)
    assert len(trials) == 16
    for trial in trials:
        assert (trial.state == TrialState.FAIL) == (trial.params["kind"] == "odd")
    reasons = {trial.user_attrs[census.REASON] for trial in trials if trial.state == TrialState.FAIL}
    assert reasons
    assert all(re.fullmatch(r"out of memory|ValueError: nothing works \(toy_search.py, line \d+\)", reason) for reason in reasons)


def test_a_study_in_which_everything_fails_stops_and_says_why(toy, run, trials_of):
    with pytest.raises(Failure, match=r"^the first 5 trials all failed, the last one: (ValueError: nothing works|out of memory)"):
        run(Toy(toy.log, fails="all"), total=30, workers=2)
    assert len(started(toy)) <= 6
    left = states(trials_of("toy"))
    assert left["FAIL"] >= 5 and left.keys() <= {"FAIL", "WAITING"}  # one that was at work when the command gave up waits to be run again
    fixed = run(toy, total=8)  # the user has mended it: the same command goes on
    assert states(fixed)["COMPLETE"] >= 2


def test_failures_in_a_row_do_not_end_a_study_in_which_something_has_worked(toy, run, run_here):
    run_here(toy, total=2)
    trials = run(Toy(toy.log, fails="all"), total=2 + census.HOPELESS + 2)
    assert states(trials) == {"COMPLETE": 2, "FAIL": census.HOPELESS + 2}


def test_a_database_that_does_not_answer_is_not_the_trials_failure(toy, tmp_path):
    url = address(None, root=tmp_path)
    definition = toy.definition()
    study = studies.create(definition, url)
    trial = studies.claim(study, definition, url, total=9, since=0, seed=0)

    def objective(attempt: worker.Attempt) -> tuple[float]:
        raise StorageGone("the studies' database does not answer")

    with pytest.raises(StorageGone):
        worker.run(study, trial, objective, tmp_path)
    assert states(study.get_trials()) == {"RUNNING": 1}


def test_a_database_that_stays_away_is_told_apart_from_other_failures(monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.0)

    def away() -> None:
        raise StorageInternalError("optuna's own words") from sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("gone"))

    with pytest.raises(StorageGone, match=r"does not answer: gone; the same command goes on$"):
        patience.patiently(away)


def test_what_keeps_workers_from_starting_is_said_in_one_line(toy, run):
    with pytest.raises(UserError, match=r"^there is no model 'X'$"):
        run(Toy(toy.log, unusable="there is no model 'X'"), total=3, workers=2)


def test_workers_that_only_die_are_not_replaced_for_ever(toy, run, monkeypatch):
    monkeypatch.setattr(supervisor, "MOST_DEATHS", 3)

    def kill(_: Sequence[FrozenTrial]) -> None:
        for child in supervisor.multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(Failure, match="workers were killed 4 times without getting any further"):
        run(Toy(toy.log, pause=0.05), total=3, watch=kill)


# What is searched, and what wins


def test_another_space_under_the_same_name_is_refused_or_replaces(toy, tmp_path, run_here):
    run_here(toy, total=2)
    url = address(None, root=tmp_path)
    with pytest.raises(UserError, match=r"^the study toy searched another space.*--name toy-2, or throw that one away: --replace$"):
        studies.create(Toy(toy.log, version=1).definition(), url)
    assert len(studies.create(toy.definition(), url, replace=True).get_trials()) == 2
    assert states(studies.create(Toy(toy.log, version=1).definition(), url, replace=True).get_trials()) == {"WAITING": 1}


@pytest.mark.parametrize("works", ["on a trial", "on the winner"])
def test_a_study_that_somebody_works_on_is_not_thrown_away(toy, tmp_path, works):
    """Its processes would go on in the new study, which may get the old one's number."""
    url, other = address(None, root=tmp_path), Toy(toy.log, version=1).definition()
    study = studies.create(toy.definition(), url)
    turn = Turn(study, url, "confirm")
    if works == "on a trial":
        trial = studies.claim(study, toy.definition(), url, total=1, since=0, seed=0)
    else:
        assert turn.take()
    with pytest.raises(UserError, match=rf"^process {os.getpid()} on .* is at work on toy, which --replace would throw away; end that"):
        studies.create(other, url, replace=True)
    study.tell(trial, 1.0) if works == "on a trial" else turn.give_back()
    assert states(studies.create(other, url, replace=True).get_trials()) == {"WAITING": 1}
    with pytest.raises(Failure, match="another command has thrown it away or put another one in its place"):
        studies.claim(study, toy.definition(), url, total=9, since=0, seed=0)


def test_a_study_that_was_deleted_is_one_line(toy, tmp_path):
    url = address(None, root=tmp_path)
    study = studies.create(toy.definition(), url)
    optuna.delete_study(study_name="toy", storage=url)
    with pytest.raises(Failure, match="the study is gone"):
        study.get_trials()


def test_a_database_that_was_removed_leaves_nothing_to_the_next(toy, tmp_path, run_here, fresh_database):
    """SQLite keeps the last transactions in a file beside it."""
    run_here(toy, total=2)
    study = studies.create(toy.definition(), address(None, root=tmp_path))  # holds it open
    (tmp_path / "optuna.db").unlink()
    assert (tmp_path / "optuna.db-wal").exists()
    assert states(studies.create(toy.definition(), address(None, root=tmp_path)).get_trials()) == {"WAITING": 1}
    del study


def test_the_winner_keeps_the_constraint(toy, run_here):
    trials = run_here(Toy(toy.log, floor=1.0), total=20)
    best = census.ranked(trials, ("minimize",))[0]
    assert best.params["x"] >= 1.0
    infeasible = [trial for trial in trials if trial.params["x"] < 1.0]
    assert min(trial.value for trial in infeasible) < best.value  # a better one was tried, and does not count
    assert best.value == min(trial.value for trial in trials if trial.params["x"] >= 1.0)


def test_poor_trials_are_pruned_but_never_the_default(toy, run_here):
    trials = run_here(Toy(toy.log, steps=4, pruner=hyperband), total=20)
    assert states(trials)["PRUNED"] >= 3
    assert trials[0].state == TrialState.COMPLETE
    assert all(trial.last_step < 4 for trial in trials if trial.state == TrialState.PRUNED)


def test_two_objectives_are_searched_without_pruning(toy, run_here):
    trials = run_here(Toy(toy.log, two=True, metrics=("value", "x")), total=8)
    assert states(trials) == {"COMPLETE": 8} and all(len(trial.values) == 2 for trial in trials)


def test_scratch_is_the_trials_own_found_again_by_its_retry_and_gone_when_it_ends(toy, tmp_path):
    url, seen = address(None, root=tmp_path), []
    definition = toy.definition()
    study = studies.create(definition, url)

    def objective(attempt: worker.Attempt) -> tuple[float]:
        attempt.scratch.mkdir(parents=True, exist_ok=True)
        seen.append((attempt.scratch.name, sorted(path.name for path in attempt.scratch.iterdir())))
        (attempt.scratch / "epoch").touch()
        return (1.0,)

    claimed = studies.claim(study, definition, url, total=9, since=0, seed=0)
    (tmp_path / "trial-0").mkdir()
    (tmp_path / "trial-0" / "epoch").touch()
    study.tell(claimed, state=TrialState.FAIL)
    studies.bury(study, url)
    for _ in range(2):
        worker.run(study, studies.claim(study, definition, url, total=9, since=0, seed=0), objective, tmp_path)
    assert seen == [("trial-0", ["epoch"]), ("trial-2", [])]
    assert not list(tmp_path.glob("trial-*"))


def test_a_result_that_comes_after_the_trial_was_given_to_another_is_dropped(toy, tmp_path):
    url = address(None, root=tmp_path)
    definition = toy.definition()
    study = studies.create(definition, url)
    claimed = studies.claim(study, definition, url, total=9, since=0, seed=0)
    study._storage.set_trial_state_values(claimed._trial_id, TrialState.FAIL)
    studies.bury(study, url)
    worker.run(study, claimed, lambda attempt: (1.0,), tmp_path)
    assert states(study.get_trials()) == {"FAIL": 1, "WAITING": 1}


# Storage


def test_a_storage_that_is_none_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"is no database; write sqlite:///optuna.db or postgresql://user@host/name"):
        address("studies.db", root=tmp_path)
    with pytest.raises(UserError, match="is no database"):
        address("redis://here", root=tmp_path)
    with pytest.raises(UserError, match=r"^--storage 'postgresql://me:\*\*\*@here:port/x' is no database"):
        address("postgresql://me:secret@here:port/x", root=tmp_path)


def test_a_server_that_cannot_be_reached_is_named_without_its_password():
    with pytest.raises(UserError, match=r"^--storage postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x.* cannot be used: ") as caught:
        connect("postgresql+psycopg://me:secret@127.0.0.1:1/x?connect_timeout=1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_an_address_without_a_file_is_refused(tmp_path, url):
    with pytest.raises(UserError, match=rf"^--storage '{url}' names no file; write sqlite:///optuna.db$"):
        address(url, root=tmp_path)


def test_a_file_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for path in ("/proc/x.db", str(tmp_path / "file" / "x.db")):
        with pytest.raises(UserError, match=rf"^--storage sqlite:///{path} cannot be used: \w+"), lock(f"sqlite:///{path}"):
            pass


def test_a_lock_that_is_never_given_back_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "LOCK_PATIENCE", 0.2)
    url = address(None, root=tmp_path)
    with lock(url), pytest.raises(StorageGone, match=r"optuna.db.lock for 0.2 s; end it, then the same command goes on$"), lock(url):
        pass


def test_a_server_that_cannot_be_reached_costs_no_patience(toy):
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^--storage postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x cannot be used: .*refused"):
        studies.create(toy.definition(), "postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert time.monotonic() - started < 10


def test_the_driver_that_is_absent_is_named(monkeypatch):
    for url, wanted in {"mysql+pymysql": "pymysql", "mysql": "mysqlclient", "postgresql+psycopg2": "psycopg2-binary"}.items():
        with pytest.raises(UserError, match=rf"^--storage {re.escape(url)}://me:\*\*\*@h/x needs the driver \w+: pip install '{wanted}'$"):
            reach(f"{url}://me:secret@h/x")


def test_only_what_may_pass_is_waited_for():
    for error in (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.DataError, sqlalchemy.exc.ProgrammingError):
        tried = []

        def refused(error=error, tried=tried) -> None:
            tried.append(1)
            raise StorageInternalError("optuna's own words") from error("INSERT", {}, Exception("value too long"))

        with pytest.raises(Failure, match=r"^the studies' database refuses: value too long$"):
            patience.patiently(refused)
        assert len(tried) == 1


@pytest.mark.parametrize(("answer", "given"), [(1, True), (0, False), (None, False)])
def test_mysqls_answer_is_heeded(monkeypatch, answer, given):
    """GET_LOCK returns 0 when it is out of time, and NULL after an error."""
    asked, closed = [], []

    class Session:
        def execute(self, statement):
            asked.append(str(statement))
            return self

        def scalar(self):
            return answer

        def close(self):
            closed.append(1)

    class Engine:
        dialect = type("Dialect", (), {"name": "mysql"})
        connect = staticmethod(Session)

    monkeypatch.setattr(locking, "_unpooled", lambda url: Engine)
    with contextlib.ExitStack() as stack:
        if not given:
            stack.enter_context(pytest.raises(StorageGone, match="another process holds the lock of the studies' database"))
        with lock("mysql://me@h/x"):
            assert given and not closed
    assert "GET_LOCK" in asked[-1] and closed == [1]


def test_curves_of_any_length_fit_into_mysqls_columns(toy, tmp_path):
    url, definition = address(None, root=tmp_path), toy.definition()
    study = studies.create(definition, url)
    records = [{"epoch": epoch, **{f"train/figure-{number}": epoch / 7 for number in range(20)}} for epoch in range(1, 301)]

    def objective(attempt: worker.Attempt) -> tuple[float]:
        attempt.history.extend(records)
        return (1.0,)

    worker.run(study, studies.claim(study, definition, url, total=9, since=0, seed=0), objective, tmp_path)
    trial = study.get_trials()[0]
    sizes = [len(json.dumps(value)) for value in trial.user_attrs.values()]
    assert sum(sizes) > 2 * 65_535 and max(sizes) < 65_535
    assert census.history_of(trial) == records


def test_a_file_that_is_no_database_is_refused_in_one_line(tmp_path):
    (tmp_path / "optuna.db").write_text("notes")
    with pytest.raises(UserError, match="cannot be used: file is not a database"):
        connect(address(None, root=tmp_path))


def test_a_relative_database_lies_in_the_workspace(tmp_path):
    assert address(None, root=tmp_path) == f"sqlite:///{tmp_path / 'optuna.db'}"
    assert address("sqlite:///other.db", root=tmp_path) == f"sqlite:///{tmp_path / 'other.db'}"


def test_a_kill_while_the_database_is_made_does_no_harm(tmp_path, fresh_database):
    url = address(None, root=tmp_path)
    (tmp_path / "optuna.db.new").write_text("half")
    with lock(url):
        connect(url)
    assert not (tmp_path / "optuna.db.new").exists()


def test_the_space_of_the_toy_is_one_that_params_yaml_can_hold():
    assert {kind for dimension in SPACE.values() for kind in dimension} == {"float", "int", "choice"}
