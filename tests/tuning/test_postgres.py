"""Studies on a real PostgreSQL server: several commands share one, and kills leave nothing behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from advml.errors import UserError
from advml.tuning import census, locking
from advml.tuning import study as studies
from advml.tuning.patience import StorageGone

sys.path.insert(0, str(Path(__file__).parent))
from toy_search import Toy

pytestmark = pytest.mark.postgres


@pytest.fixture
def url(new_database: Callable[[], str]) -> str:
    return new_database()


def numbers(toy: Toy) -> list[int]:
    return sorted(int(line.split()[0]) for line in toy.log.read_text().splitlines())


@pytest.mark.parametrize("round_number", range(10))
def test_four_workers_on_a_fresh_database_run_every_trial_once(tmp_path, run, url, round_number):
    toy = Toy(tmp_path / "log")
    trials = run(toy, total=12, workers=4, url=url)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 12
    assert numbers(toy) == list(range(12))


def test_two_commands_on_a_fresh_database_share_one_total(tmp_path, run, url):
    toy = Toy(tmp_path / "log", pause=0.02)
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from toy_search import Toy
from advml.tuning import study, supervisor, worker
supervisor.PRELOADED = ["advml.tuning.worker", *supervisor.LAZY]
if __name__ == "__main__":
    toy = Toy(Path({str(toy.log)!r}), pause=0.02)
    opened = study.create(toy.definition(), {url!r})
    orders = worker.Orders(toy, {url!r}, 30, 0, 7, Path({str(tmp_path / "elsewhere")!r}))
    supervisor.supervise(opened, orders, workers=2, watch=lambda trials: None)
"""
    (tmp_path / "elsewhere.py").write_text(code)
    other = subprocess.Popen([sys.executable, str(tmp_path / "elsewhere.py")])
    trials = run(toy, total=30, workers=2, url=url)
    assert other.wait(60) == 0
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 30 and numbers(toy) == list(range(30))


def test_a_study_whose_workers_are_killed_at_random_finishes_every_trial(tmp_path, run, url):
    random_numbers, killed, last = random.Random(0), [], [time.monotonic()]

    def kill(trials: Sequence[FrozenTrial]) -> None:
        victims = [trial for trial in census.running(trials) if census.pid_of(trial)]
        if victims and len(killed) < 12 and time.monotonic() - last[0] > 0.25:
            os.kill(census.pid_of(random_numbers.choice(victims)), signal.SIGKILL)
            killed.append(1)
            last[0] = time.monotonic()

    trials = run(Toy(tmp_path / "log", pause=0.03), total=40, workers=4, watch=kill, url=url)
    finished = census.finished(trials)
    assert len(killed) == 12 and len(finished) == 40
    assert {trial.user_attrs.get(census.REASON, trial.state) for trial in finished} == {TrialState.COMPLETE}
    assert not [trial for trial in trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)]


def test_a_lock_that_is_never_given_back_is_told(url, monkeypatch):
    kind = locking.LOCKS["postgresql"]
    hasty = tuple("SET lock_timeout = '300ms'" if "lock_timeout" in statement else statement for statement in kind.before)
    assert hasty != kind.before
    monkeypatch.setitem(locking.LOCKS, "postgresql", replace(kind, before=hasty))
    said = r"^another process holds the lock .* \(SELECT pid FROM pg_locks WHERE locktype = 'advisory'\), then the same command goes on$"
    with locking.lock(url), pytest.raises(StorageGone, match=said), locking.lock(url):
        pass
    with locking.lock(url):
        pass


def test_a_database_that_is_not_there_is_said_at_once_in_the_servers_words(tmp_path, url):
    wrong = sqlalchemy.make_url(url).set(database="nowhere").render_as_string(hide_password=False)
    started = time.monotonic()
    with pytest.raises(UserError, match=r'cannot be used: .*database "nowhere" does not exist$'):
        studies.create(Toy(tmp_path / "log").definition(), wrong)
    assert time.monotonic() - started < 10


def test_a_server_that_restarts_is_waited_for(tmp_path, run, postgres, url):
    """Every connection is cut in the middle of a study, as a restart does."""
    if "ADVML_POSTGRES_URL" in os.environ:
        pytest.skip("the server is somebody else's")
    engine = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    end, name, cuts = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :n", sqlalchemy.make_url(url).database, []

    def cut(trials: Sequence[FrozenTrial]) -> None:
        if len(cuts) < 3 and len(census.finished(trials)) > 4 * (len(cuts) + 1):
            with engine.connect() as connection:
                connection.execute(sqlalchemy.text(end), {"n": name})
            cuts.append(1)

    trials = run(Toy(tmp_path / "log", pause=0.02), total=24, workers=3, watch=cut, url=url)
    finished = census.finished(trials)
    assert len(cuts) == 3 and len(finished) == 24
    assert not [trial for trial in trials if trial.state == TrialState.RUNNING]
    shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
