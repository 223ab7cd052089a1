"""Studies on a real PostgreSQL server: one driver at a time, and kills leave nothing behind; the same kills with SQLite."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy

from advml.core.errors import UserError
from advml.tuning.storage import address, alone

sys.path.insert(0, str(Path(__file__).parent))
from killing import at_work, survives, wait_for
from toy_search import Toy

pytestmark = pytest.mark.postgres


@pytest.fixture
def url(new_database: Callable[[], str]) -> str:
    return new_database()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_study_whose_processes_and_drivers_are_killed_at_random_finishes_every_trial_once(study, driver, request, database):
    url = request.getfixturevalue("url") if database == "postgresql" else address(None, root=study.root)
    survives(Toy(study.root / "log"), driver, url, trials=40, kills=4, drivers=3)


def test_a_second_driver_is_told_of_the_first_and_one_of_another_study_is_not_stopped(study, driver, url):
    first = driver(pause=60, storage=url)
    wait_for(lambda: len(at_work(Toy(study.root / "log"))) == 2, first)
    with pytest.raises(UserError, match=rf"toy .*\(process {first.pid} on .+\)"), alone(url, "toy"):
        pass
    with alone(url, "another"):
        pass
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 30
    while True:  # the server may need a moment to see that the connection is gone
        try:
            with alone(url, "toy"):
                return
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_database_that_is_not_there_is_said_at_once_in_the_servers_words(url):
    wrong = sqlalchemy.make_url(url).set(database="nowhere").render_as_string(hide_password=False)
    started = time.monotonic()
    with pytest.raises(UserError, match=r'cannot be used: .*database "nowhere" does not exist$'), alone(wrong, "toy"):
        pass
    assert time.monotonic() - started < 10


def test_a_server_that_cuts_its_connections_ends_the_command_which_goes_on_when_repeated(study, driver, postgres, url):
    """As a restart does: the lock is gone, and another driver may have it."""
    first = driver(pause=0.3, trials=6, storage=url)
    wait_for(lambda: len(at_work(Toy(study.root / "log"))) == 2, first)
    engine = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
    end = sqlalchemy.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
    with engine.connect() as connection:
        connection.execute(end, {"name": sqlalchemy.make_url(url).database})
    assert re.search(r"the searches' database failed: .+; repeat the command", first.communicate(timeout=60)[1])
    second = driver(pause=0, trials=6, storage=url)
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 0 and "[6/6]" in said
