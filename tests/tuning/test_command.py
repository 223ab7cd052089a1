"""The whole command on a toy: what it writes, what MLflow shows, and that an interruption leaves both in order."""

from __future__ import annotations

import csv
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from advml.errors import Failure, UserError
from advml.runtime import processes
from advml.tracking import store as stores
from advml.tuning import census, command, confirmation, supervisor, turn
from advml.tuning import study as studies
from advml.tuning.apply import proposal
from advml.tuning.history import History
from advml.tuning.turn import Turn
from advml.tuning.worker import Orders, work

sys.path.insert(0, str(Path(__file__).parent))
from toy_search import Toy, written_without_figures


class NoHistory(History):
    """Another command writes the runs, and does not end."""

    def __enter__(self) -> History:
        return self

    def _is_ours(self) -> bool:
        return False


@pytest.fixture
def tune(study, monkeypatch):
    """tune(toy, trials=3) runs the command in a study's folder. Figures and MLflow runs, which take the longest, are made if asked for."""

    def run(
        toy: Toy,
        *,
        trials: int,
        workers: int = 1,
        overrides: tuple[str, ...] = (),
        replace: bool = False,
        figures: bool = False,
        history: bool = False,
    ) -> command.Outcome:
        config = study.config(*overrides)
        with monkeypatch.context() as patch:
            if not figures:
                patch.setattr(command.outputs, "write", written_without_figures)
            if not history:
                patch.setattr(command, "History", NoHistory)
            return command.tune(toy, config, study.workspace, storage=None, trials=trials, workers=workers, seed=0, replace=replace)

    return run


@pytest.fixture
def toy(study) -> Toy:
    return Toy(study.root / "log")


def runs(study) -> dict[str, object]:
    """MLflow runs by name; none is there twice."""
    store = stores.connect(stores.locate(study.config(), root=study.root))
    found = store.client.search_runs([store.experiment])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def best(outcome: command.Outcome) -> dict:
    return YAML(typ="safe").load((outcome.folder / "best.yaml").read_text())


def test_a_study_leaves_a_proposal_a_table_and_figures(tune, toy, study):
    outcome = tune(Toy(toy.log, fails="odd"), trials=14, workers=2, figures=True, history=True)
    told = best(outcome)
    assert outcome.folder.name == "toy" and told["trial"] == outcome.best.number
    assert told["parameters"] == {f"toy.{key}": value for key, value in outcome.best.params.items()}
    assert told["scored"]["value"] < told["default_scored"]["value"] == 17.0
    assert told["test"]["value"] == pytest.approx(told["scored"]["value"])
    rows = list(csv.DictReader((outcome.folder / "trials.csv").read_text().splitlines()))
    assert len(rows) == 14 and {row["state"] for row in rows} == {"complete", "failed"}
    assert all(bool(row["reason"]) == (row["state"] == "failed") == (row["kind"] == "odd") for row in rows)
    assert {path.name for path in outcome.files} == {
        *("best.yaml", "trials.csv", "history.png", "importance.png", "parallel.png", "slice.png")
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in outcome.files if path.suffix == ".png")
    artifacts = stores.connect(stores.locate(study.config(), root=study.root)).client.list_artifacts(runs(study)["toy"].info.run_id, "tune")
    assert {file.path for file in artifacts} == {f"tune/{path.name}" for path in outcome.files}


def test_the_front_of_two_objectives_is_drawn_and_one_of_its_trials_must_be_chosen(tune, toy, study):
    outcome = tune(Toy(toy.log, two=True, metrics=("value", "x")), trials=6, figures=True)
    assert (outcome.folder / "pareto.png").exists()
    opened = studies.create(Toy(toy.log, two=True).definition(), command.address(None, root=study.root))
    assert [one["trial"] for one in best(outcome)["front"]] == [
        trial.number for trial in sorted(opened.best_trials, key=lambda trial: trial.values[0])
    ]
    chosen = best(outcome)["front"][-1]
    assert proposal(study.workspace, "toy", trial=chosen["trial"]) == chosen["parameters"]
    for number in (None, 99):
        with pytest.raises(UserError, match=r"^toy proposes a front; choose one of its trials: --trial \d+"):
            proposal(study.workspace, "toy", trial=number)


def test_mlflow_shows_a_parent_and_a_run_per_trial_and_a_second_command_adds_to_them(tune, toy, study):
    tune(Toy(toy.log, fails="odd"), trials=5, history=True)
    before = runs(study)
    outcome = tune(Toy(toy.log, fails="odd"), trials=8, history=True)
    after = runs(study)
    assert before.keys() < after.keys() == {"toy", *(f"toy/{number}" for number in range(8))}
    parent = after["toy"]
    assert parent.info.run_id == before["toy"].info.run_id and parent.info.status == "FINISHED"
    for trial in studies.create(toy.definition(), command.address(None, root=study.root)).get_trials():
        run = after[f"toy/{trial.number}"]
        failed = trial.params["kind"] == "odd"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FAILED" if failed else "FINISHED")
        assert run.data.tags["advml.state"] == ("failed" if failed else "complete")
        assert run.data.params["toy.kind"] == trial.params["kind"]
        assert failed or run.data.metrics["value"] == pytest.approx(trial.value)
        assert ("advml.best" in run.data.tags) == (trial.number == outcome.best.number)
    store = stores.connect(stores.locate(study.config(), root=study.root))
    curve = store.client.get_metric_history(after["toy/0"].info.run_id, "value")
    assert sorted({point.step for point in curve}) == [0, 1, 2, 3]  # the epochs, and the final score


def test_results_of_a_search_that_the_database_does_not_know_are_not_written_over_unasked(tune, toy, study):
    tune(toy, trials=2)
    kept = (study.workspace.reports / "tune" / "toy" / "best.yaml").read_text()
    for file in study.root.glob("optuna.db*"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds the results of a search of which sqlite:.* knows nothing; .*--name toy-2.*--replace$"):
        tune(toy, trials=3)
    assert (study.workspace.reports / "tune" / "toy" / "best.yaml").read_text() == kept
    assert tune(toy, trials=3, replace=True).finished == 3


def test_the_winner_is_confirmed_once_and_a_new_winner_again(tune, toy, monkeypatch):
    asked = []
    whole = command.in_a_process
    monkeypatch.setattr(command, "in_a_process", lambda function, *rest: asked.append(function.__name__) or whole(function, *rest))
    first = tune(toy, trials=1)
    tune(toy, trials=1)
    assert asked.count("confirm") == 1
    last = tune(toy, trials=3)
    assert last.best.number != first.best.number and asked.count("confirm") == 2
    assert best(last)["winners_confirmed"] == 2


def test_ctrl_c_ends_cleanly_with_the_best_so_far_and_the_same_command_goes_on(tune, toy, study, capfd):
    def interrupt() -> None:
        while not toy.log.exists() or len(toy.log.read_text().splitlines()) < 5:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        tune(Toy(toy.log, pause=0.05), trials=200, workers=2, history=True)
    assert (study.workspace.reports / "tune" / "toy" / "best.yaml").exists()
    assert "of 200 trials; the best so far is trial " in capfd.readouterr().err
    trials = studies.create(toy.definition(), command.address(None, root=study.root)).get_trials()
    assert not census.running(trials)
    assert {run.info.status for run in runs(study).values()} <= {"FINISHED", "KILLED"} and runs(study)["toy"].info.status == "KILLED"
    done = len(census.finished(trials))
    outcome = tune(Toy(toy.log, pause=0.0), trials=done + 3, workers=2, history=True)
    assert outcome.finished == done + 3 and runs(study)["toy"].info.status == "FINISHED"


def test_a_dead_tracking_server_costs_a_warning_only(tune, toy, capfd):
    outcome = tune(toy, trials=3, overrides=("tracking.uri=http://127.0.0.1:9",), history=True)
    assert outcome.finished == 3 and best(outcome)["trials"]["complete"] == 3
    assert capfd.readouterr().err.count("warning: no tracking") == 1


def test_a_study_in_which_everything_fails_still_leaves_its_table(tune, toy, study):
    with pytest.raises(Failure, match="trials all failed"):
        tune(Toy(toy.log, fails="all"), trials=9, history=True)
    folder = study.workspace.reports / "tune" / "toy"
    assert (folder / "trials.csv").exists() and not (folder / "best.yaml").exists()
    assert runs(study)["toy"].info.status == "FAILED"


def test_without_a_terminal_every_finished_trial_is_a_line(tune, toy, capfd):
    tune(Toy(toy.log, floor=0.0), trials=3)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[")]
    assert len(lines) == 3
    assert lines[0].startswith("[1/3] trial 0: value 17  x=4 n=1 kind=plain  (best: value 17, trial 0)")


def test_the_live_table_shows_the_best_first_and_who_is_at_work(tune, toy, study):
    from io import StringIO

    from rich.console import Console

    from advml.tuning.board import Board

    tune(Toy(toy.log, fails="odd"), trials=6)
    opened = studies.create(toy.definition(), command.address(None, root=study.root))
    board = Board("toy", metrics=("value",), directions=("minimize",), total=6)
    stream = StringIO()
    Console(file=stream, width=120).print(board._table(opened.get_trials()))
    text = stream.getvalue()
    ranked = census.ranked(opened.get_trials(), ("minimize",))
    assert "6 of 6 trials, 0 running" in text
    assert text.index(f"value {ranked[0].value:.4g}") < text.index(f"value {ranked[-1].value:.4g}")


def test_workers_import_what_searches_need_only_once(tmp_path):
    """The names that the server of workers imports must exist: it passes over those that do not. Trials themselves need no torch."""
    code = (
        "import importlib.util, sys\nfrom pathlib import Path\nfrom advml.tuning import sampling, storage, study, supervisor\n"
        "for name in supervisor.PRELOADED:\n    assert importlib.util.find_spec(name)\n"
        "for name in ('advml.tuning.outputs', *supervisor.LAZY):\n    importlib.import_module(name)\nbefore = set(sys.modules)\n"
        "url = storage.address(None, root=Path(sys.argv[1]))\n"
        "opened = __import__('optuna').create_study(storage=storage.connect(url), sampler=sampling.tpe(0))\n"
        "opened.optimize(lambda trial: trial.suggest_float('x', 0, 1), n_trials=10)\n"
        "late = {name.partition('.')[0] for name in set(sys.modules) - before if not name.startswith('alembic.')}\n"
        "print(sorted(late & {'optuna', 'sqlalchemy', 'alembic', 'mako', 'torch', 'sklearn', 'pandas', 'scipy', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_name_that_leads_out_of_its_folder_removes_nothing(tune, toy, study):
    kept = study.workspace.scratch("keep")
    kept.mkdir(parents=True)
    with pytest.raises(UserError, match=r"^--name '\.\./\.\.' is no name"):
        tune(Toy(toy.log, name="../.."), trials=1)
    assert kept.is_dir() and not toy.log.exists()


def after(toy: Toy, word: str, act) -> None:
    """Act in a thread once a line of the log begins with the word."""

    def wait() -> None:
        while not toy.log.exists() or not any(line.startswith(word) for line in toy.log.read_text().splitlines()):
            time.sleep(0.02)
        act()

    threading.Thread(target=wait).start()


def test_ctrl_c_during_the_confirmation_ends_at_once_and_the_child_with_it(tune, toy):
    after(toy, "confirm", lambda: os.kill(os.getpid(), signal.SIGINT))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        tune(Toy(toy.log, confirmation="slow"), trials=2)
    assert time.monotonic() - started < 30
    child = int(toy.log.read_text().splitlines()[-1].split()[1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert best(tune(toy, trials=2))["test"]["value"]


BREAKING = (
    ("killed", Failure, r"^the process that measures and writes was killed, perhaps for want of memory; the same command goes on$"),
    ("broken", Failure, r"^the process that measures and writes ended with an error, which stands above; the same command goes on$"),
    ("refused", UserError, r"^there is no test split$"),
)


def test_a_confirmation_that_breaks_is_one_line_and_the_same_command_goes_on(tune, toy):
    for how, kind, said in BREAKING:
        with pytest.raises(kind, match=said):
            tune(Toy(toy.log, confirmation=how), trials=2)
    assert best(tune(toy, trials=2))["test"]["value"]


def test_an_interruption_keeps_what_was_confirmed(tune, toy):
    first = best(tune(Toy(toy.log, floor=4.0), trials=2))
    assert first["trial"] == 0 and first["test"] == {"value": 17.0}
    toy.log.write_text("")
    after(toy, "2 ", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        tune(Toy(toy.log, floor=4.0, pause=5), trials=9)
    again = YAML(typ="safe").load((study_folder(toy) / "best.yaml").read_text())
    assert again["trial"] == 0 and again["test"] == first["test"]


def study_folder(toy: Toy) -> Path:
    return toy.log.parent / "reports" / "tune" / "toy"


def test_what_is_asked_for_later_is_measured_alone_and_once(tune, toy, monkeypatch):
    asked = []
    whole = command.in_a_process
    monkeypatch.setattr(command, "in_a_process", lambda function, *rest: asked.append(function.__name__) or whole(function, *rest))
    assert "autoattack" not in best(tune(toy, trials=2))
    told = [best(tune(Toy(toy.log, once=("autoattack",)), trials=2)) for _ in range(2)]
    assert told[0]["autoattack"] == told[1]["autoattack"] == {"of": "autoattack"} and "test" in told[0]
    assert (asked.count("confirm"), asked.count("measure")) == (1, 1)
    assert "autoattack" in best(tune(toy, trials=2))  # what is known is told


def test_a_new_study_of_the_same_name_has_scratch_folders_of_its_own(tune, toy, study, monkeypatch):
    seen = []
    monkeypatch.setattr(supervisor, "supervise", lambda opened, orders, **_: seen.append(orders.scratch))
    tune(toy, trials=2)
    tune(toy, trials=3)
    tune(Toy(toy.log, version=1), trials=2, replace=True)
    for file in study.root.glob("optuna.db*"):
        file.unlink()
    tune(Toy(toy.log, version=1), trials=2)
    assert seen[0] == seen[1] and len(set(seen)) == 3
    assert {path.parent for path in seen} == {study.workspace.scratch("tune/toy").resolve()}


# Several commands on one study

ELSEWHERE = """
import sys; sys.path.insert(0, {folder!r})
from pathlib import Path
from toy_search import Toy
from advml.config import load
from advml.paths import Workspace
from advml.tuning import command, supervisor
supervisor.PRELOADED = ["advml.tuning.worker", "advml.tuning.outputs"]
if __name__ == "__main__":
    root = Path({root!r})
    toy = Toy(root / "log", pause=0.05, confirmation="brief")
    command.tune(toy, load(root / "params.yaml"), Workspace(root), storage=None, trials={trials}, workers=1, seed=1)
"""


def elsewhere(study, *, trials: int) -> subprocess.Popen:
    """The same command, in a process of its own."""
    script = study.root / "elsewhere.py"
    script.write_text(ELSEWHERE.format(folder=str(Path(__file__).parent), root=str(study.root), trials=trials))
    return subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)


def test_two_commands_confirm_a_winner_once_and_write_one_tree_of_runs(tune, toy, study):
    other = elsewhere(study, trials=8)
    outcome = tune(Toy(toy.log, pause=0.05, confirmation="brief"), trials=8, history=True)
    said = other.communicate(timeout=60)[1]
    assert other.returncode == 0, said
    lines = toy.log.read_text().splitlines()
    assert sum(line.startswith("confirm") for line in lines) == 1 and len(lines) == 9
    assert best(outcome)["test"]["value"] == pytest.approx(outcome.best.value)
    found = runs(study)  # each name once
    assert found.keys() == {"toy", *(f"toy/{number}" for number in range(8))}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert not study.workspace.scratch("tune/toy").exists()


def opened(toy: Toy, study):
    url = command.address(None, root=study.root)
    return studies.create(toy.definition(), url), url


def test_a_turn_is_one_processes_until_it_gives_it_back_or_dies(toy, study):
    same, url = opened(toy, study)
    ours, theirs = Turn(same, url, "confirm"), Turn(same, url, "confirm")
    assert ours.take() and not theirs.take() and theirs.holder == f"process {os.getpid()} on {platform.node()}"
    assert Turn(same, url, "mlflow").take()
    ours.give_back()
    assert theirs.take() and not ours.take()
    ours.give_back()  # which it has not got: nothing happens
    assert not Turn(same, url, "confirm").take()
    theirs.give_back()
    child = os.fork()
    if child == 0:
        os._exit(0 if Turn(*opened(toy, study), "confirm").take() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ours.take()  # from the dead


def test_a_turn_on_another_machine_passes_on_when_its_signs_of_life_stop(toy, study, monkeypatch):
    same, url = opened(toy, study)
    theirs, ours = Turn(same, url, "confirm"), Turn(same, url, "confirm")
    monkeypatch.setattr(turn, "HEARTBEAT", 0.1)
    monkeypatch.setattr(turn, "GRACE", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "machine", lambda: "elsewhere:1")
        assert theirs.take()
        started = time.monotonic()
        while time.monotonic() - started < 2.0:
            assert not ours.take()
            time.sleep(0.1)
    theirs._ended.set()  # it beats no more
    time.sleep(0.3)
    assert not ours.take()
    time.sleep(1.1)
    assert ours.take()


def test_who_waits_for_a_confirmation_is_told_for_whom_and_measures_nothing_again(tune, toy, study, capfd):
    tune(Toy(toy.log), trials=1)
    same, url = opened(toy, study)
    held = Turn(same, url, "confirm")
    assert held.take()

    def be_done() -> None:
        time.sleep(2.0)
        known = same.user_attrs["confirmed"]
        same.set_user_attr("measured", {"autoattack": {"of": "theirs"}})
        assert known["times"] == 1
        held.give_back()

    thread = threading.Thread(target=be_done)
    thread.start()
    outcome = tune(Toy(toy.log, once=("autoattack",)), trials=1)
    thread.join()
    assert outcome.confirmed["autoattack"] == {"of": "theirs"}
    assert f"toy: the winner is being confirmed by process {os.getpid()} on " in capfd.readouterr().err


def test_a_command_succeeds_the_one_that_wrote_the_runs(tune, toy, study, capfd):
    same, url = opened(toy, study)
    held = History(toy, study.config(), study.workspace, same, url)
    with held:
        tune(toy, trials=2, history=True)
        assert runs(study).keys() == {"toy"}  # the other command's
        assert "toy: its MLflow runs are written by process " in capfd.readouterr().err
    tune(toy, trials=3, history=True)
    assert runs(study).keys() == {"toy", "toy/0", "toy/1", "toy/2"}


def test_another_number_of_further_seeds_is_heeded_or_the_line_says_why_not(toy, study, capfd):
    same, url = opened(toy, study)
    work(Orders(toy, url, 1, 0, 0, study.root / "scratch"), 0)

    def confirm(seeds: int) -> tuple[int, str]:
        """Confirmations so far, and what is said."""
        search = Toy(toy.log, further=seeds)
        confirmation.confirm(search, same, url, search.definition().directions, lambda function, *rest: function(*rest))
        return sum(line.startswith("confirm") for line in toy.log.read_text().splitlines()), capfd.readouterr().err

    assert confirm(0) == (1, "")
    assert confirm(2) == (2, "toy: trial 0 has been confirmed on 0 further seeds; confirming it on 2\n")
    assert confirm(2) == (2, "")
    assert confirm(1) == (2, "toy: trial 0 has been confirmed on 2 further seeds, more than confirm = 1; they stay\n")
    assert "winners_confirmed" not in confirmation.confirmed(same, same.get_trials()[0])
