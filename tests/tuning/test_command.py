"""The whole command on a toy: what it writes, what MLflow shows, and that an interruption leaves both in order."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from advml.cli.live_table import LiveTable
from advml.core.errors import Failure, UserError
from advml.tuning import command
from advml.tuning import study as studies
from advml.tuning.apply import proposal
from advml.tuning.storage import address

sys.path.insert(0, str(Path(__file__).parent))
from killing import at_work, survives, wait_for
from toy_search import NoRuns, Toy, written_without_figures


@pytest.fixture
def tune(study, monkeypatch, light_server):
    """tune(toy, trials=3) runs the command in a study's folder. Figures and MLflow runs, which take the longest, are made if asked for."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def run(
        toy: Toy,
        *,
        trials: int,
        slots: int = 1,
        overrides: tuple[str, ...] = (),
        replace: bool = False,
        figures: bool = False,
        runs: bool = False,
    ) -> command.Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(command, "server", lambda *_: contextlib.nullcontext(light_server))
            if not figures:
                patch.setattr(command.outputs, "write", written_without_figures)
            if not runs:
                patch.setattr(command.tracking, "open_search", lambda *_, **__: NoRuns())
            asked = dataclasses.replace(toy, config=study.config(*overrides), root=study.root)
            options = {"storage": None, "trials": trials, "slots": slots, "replace": replace}
            with LiveTable(toy, total=trials) as table:
                return command.tune(asked, **options, watch=table.show)

    return run


@pytest.fixture
def toy(study) -> Toy:
    return Toy(study.root / "log")


def runs(study) -> dict[str, object]:
    """MLflow runs by name; none is there twice."""
    store = study.store()
    found = store.client.search_runs([store.experiment])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def best(outcome: command.Outcome) -> dict:
    return YAML(typ="safe").load((outcome.folder / "best.yaml").read_text())


def test_a_study_leaves_a_proposal_a_table_and_figures(tune, toy, study):
    outcome = tune(Toy(toy.log, fails="odd"), trials=14, slots=2, figures=True, runs=True)
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
    artifacts = study.store().client.list_artifacts(runs(study)["toy"].info.run_id, "tune")
    assert {file.path for file in artifacts} == {"tune/trials.json", *(f"tune/{path.name}" for path in outcome.files)}


def test_the_front_of_two_objectives_is_drawn_and_one_of_its_trials_must_be_chosen(tune, toy, study):
    outcome = tune(Toy(toy.log, two=True, metrics=("value", "x")), trials=6, figures=True)
    assert (outcome.folder / "pareto.png").exists()
    opened = studies.create(Toy(toy.log, two=True), address(None, root=study.root))
    assert [one["trial"] for one in best(outcome)["front"]] == [
        trial.number for trial in sorted(opened.best_trials, key=lambda trial: trial.values[0])
    ]
    chosen = best(outcome)["front"][-1]
    assert proposal(study.workspace, "toy", trial=chosen["trial"]) == chosen["parameters"]
    for number in (None, 99):
        with pytest.raises(UserError, match=r"^toy .*--trial \d+"):
            proposal(study.workspace, "toy", trial=number)


def test_mlflow_shows_a_parent_and_a_run_per_trial_and_a_second_command_adds_to_them(tune, toy, study):
    tune(Toy(toy.log, fails="odd"), trials=5, runs=True)
    before = runs(study)
    outcome = tune(Toy(toy.log, fails="odd"), trials=8, runs=True)
    after = runs(study)
    assert before.keys() < after.keys() == {"toy", *(f"toy/{number}" for number in range(8))}
    parent = after["toy"]
    assert parent.info.run_id == before["toy"].info.run_id and parent.info.status == "FINISHED"
    trials = next(key for key in before["toy"].data.params if key.endswith(".trials"))
    assert before["toy"].data.params[trials] == "5" and parent.data.tags[f"advml.now.{trials}"] == "8"
    assert studies.create(toy, address(None, root=study.root)).metric_names == ["value"]  # for Optuna's dashboard
    for trial in studies.create(toy, address(None, root=study.root)).get_trials():
        run = after[f"toy/{trial.number}"]
        failed = trial.params["kind"] == "odd"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FAILED" if failed else "FINISHED")
        assert run.data.tags["advml.state"] == ("failed" if failed else "complete")
        assert run.data.params["toy.kind"] == trial.params["kind"]
        assert failed or run.data.metrics["value"] == pytest.approx(trial.value)
        assert ("advml.best" in run.data.tags) == (trial.number == outcome.best.number)
    store = study.store()
    curve = store.client.get_metric_history(after["toy/0"].info.run_id, "value")
    assert sorted({point.step for point in curve}) == [0, 1, 2, 3]  # the epochs, and the final score


def test_results_of_a_search_that_the_database_does_not_know_are_not_written_over_unasked(tune, toy, study):
    tune(toy, trials=2)
    kept = (study.workspace.reports / "tune" / "toy" / "best.yaml").read_text()
    for file in study.root.glob("optuna.db*"):
        file.unlink()
    with pytest.raises(UserError, match=r"sqlite:.*--name toy-2.*--replace$"):
        tune(toy, trials=3)
    assert (study.workspace.reports / "tune" / "toy" / "best.yaml").read_text() == kept
    assert len(tune(toy, trials=3, replace=True).trials) == 3


def count(toy: Toy, word: str) -> int:
    """Lines of the log that begin with the word."""
    return sum(line.startswith(word) for line in toy.log.read_text().splitlines())


def test_the_winner_is_confirmed_once_and_a_new_winner_again(tune, toy):
    first = tune(toy, trials=1)
    tune(toy, trials=1)
    assert count(toy, "confirm") == 1
    last = tune(toy, trials=3)
    assert last.best.number != first.best.number and count(toy, "confirm") == 2
    assert best(last)["winners_confirmed"] == 2


def test_ctrl_c_ends_cleanly_with_the_best_so_far_and_the_same_command_goes_on(tune, toy, study, capfd):
    def interrupt() -> None:
        while not toy.log.exists() or len(toy.log.read_text().splitlines()) < 5:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        tune(Toy(toy.log, pause=0.05), trials=200, slots=2, runs=True)
    assert (study.workspace.reports / "tune" / "toy" / "best.yaml").exists()
    assert "of 200 trials; the best so far is trial " in capfd.readouterr().err
    trials = studies.create(toy, address(None, root=study.root)).get_trials()
    assert not studies.running(trials)
    assert {run.info.status for run in runs(study).values()} <= {"FINISHED", "KILLED"} and runs(study)["toy"].info.status == "KILLED"
    done = len(studies.finished(trials))
    outcome = tune(Toy(toy.log, pause=0.0), trials=done + 3, slots=2, runs=True)
    assert len(outcome.trials) == done + 3 and runs(study)["toy"].info.status == "FINISHED"


def test_a_dead_tracking_server_costs_a_warning_only(tune, toy, capfd):
    outcome = tune(toy, trials=3, overrides=("tracking.uri=http://127.0.0.1:9",), runs=True)
    assert len(outcome.trials) == 3 and best(outcome)["trials"]["complete"] == 3
    assert capfd.readouterr().err.count("warning: no tracking") == 1


def test_a_study_in_which_everything_fails_still_leaves_its_table(tune, toy, study):
    with pytest.raises(Failure, match="trials all failed"):
        tune(Toy(toy.log, fails="all"), trials=9, runs=True)
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

    tune(Toy(toy.log, fails="odd"), trials=6)
    opened = studies.create(toy, address(None, root=study.root))
    table = LiveTable(toy, total=6)
    stream = StringIO()
    Console(file=stream, width=120).print(table.table(opened.get_trials()))
    text = stream.getvalue()
    ranked = studies.ranked(opened.get_trials(), ("minimize",))
    assert "6 of 6 trials, 0 running" in text
    assert text.index(f"value {ranked[0].value:.4g}") < text.index(f"value {ranked[-1].value:.4g}")


def test_a_name_that_leads_out_of_its_folder_removes_nothing(tune, toy, study):
    kept = study.workspace.scratch("keep")
    kept.mkdir(parents=True)
    with pytest.raises(UserError, match=r"^--name '\.\./\.\.' is not valid"):
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
    assert child not in [process.pid for process in at_work(toy)]
    assert best(tune(toy, trials=2))["test"]["value"]


BREAKING = (
    ("killed", Failure, r"was killed \(out of memory\?\); repeat the command"),
    ("broken", Failure, r"^ValueError: nothing works \(toy_search.py, line \d+\)$"),
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


def test_what_is_asked_for_later_is_measured_alone_and_once(tune, toy):
    assert "autoattack" not in best(tune(toy, trials=2))
    told = [best(tune(Toy(toy.log, once=("autoattack",)), trials=2)) for _ in range(2)]
    assert told[0]["autoattack"] == told[1]["autoattack"] == {"of": "autoattack"} and "test" in told[0]
    assert (count(toy, "confirm"), count(toy, "measure")) == (1, 1)
    assert "autoattack" in best(tune(toy, trials=2))  # what is known is told


def test_another_number_of_further_seeds_is_heeded_or_the_line_says_why_not(tune, toy, capfd):
    def confirm(seeds: int) -> tuple[int, str]:
        """Confirmations so far, and what is said."""
        outcome = tune(Toy(toy.log, further_seeds=seeds), trials=1)
        assert "winners_confirmed" not in outcome.confirmed
        return count(toy, "confirm"), "".join(line for line in capfd.readouterr().err.splitlines() if "has been" in line)

    assert confirm(0) == (1, "")
    assert confirm(2) == (2, "toy: trial 0 has been confirmed on 0 further seeds; confirming it on 2")
    assert confirm(2) == (2, "")
    assert confirm(1) == (2, "toy: trial 0 has been confirmed on 2 further seeds, more than confirm = 1; they stay")


def test_a_new_study_of_the_same_name_has_scratch_folders_of_its_own(tune, toy, study, monkeypatch):
    seen, whole = [], command.Driver.scratch_of
    monkeypatch.setattr(command.Driver, "scratch_of", lambda *given: seen.append(whole(*given)) or seen[-1])
    tune(toy, trials=1)
    tune(toy, trials=2)
    tune(Toy(toy.log, version=1), trials=1, replace=True)
    for file in study.root.glob("optuna.db*"):
        file.unlink()
    tune(Toy(toy.log, version=1), trials=1, replace=True)
    assert len({path.parent for path in seen}) == 3
    assert {path.parents[1] for path in seen} == {study.workspace.scratch("tune/toy").resolve()}
    assert not study.workspace.scratch("tune/toy").exists()


# Processes


def test_four_slots_on_a_fresh_database_run_every_trial_once(tune, toy, fresh_database):
    assert len(tune(toy, trials=12, slots=4).trials) == 12
    assert len(tune(toy, trials=4, slots=4).trials) == 12
    lines = [line for line in toy.log.read_text().splitlines() if line[0].isdigit()]
    assert sorted(int(line.split()[0]) for line in lines) == list(range(12))
    assert 2 <= len({line.split()[1] for line in lines}) <= 4 and len({line.split(" ", 2)[2] for line in lines}) == 12


def test_a_study_in_which_everything_fails_ends_the_command_and_what_cannot_be_opened_too(tune, toy):
    with pytest.raises(Failure, match=r"5 trials .*(ValueError: nothing works|out of memory)"):
        tune(Toy(toy.log, fails="all"), trials=30, slots=2)
    assert count(toy, "") <= 6
    with pytest.raises(UserError, match=r"^there is no model 'X'$"):
        tune(Toy(toy.log, unusable="there is no model 'X'"), trials=30, slots=2)
    assert tune(toy, trials=8).best is not None  # the user has mended it: the same command goes on


def test_a_search_that_cannot_be_opened_leaves_no_files_and_does_not_block_the_mended_one(tune, toy):
    with pytest.raises(UserError, match="other data"):
        tune(Toy(toy.log, unusable="other data"), trials=3)
    assert not study_folder(toy).exists()
    assert len(tune(Toy(toy.log, version=1), trials=1).trials) == 1  # the data were changed, and with them the fingerprint


def test_failures_in_a_row_do_not_end_a_study_in_which_something_has_worked(tune, toy):
    tune(toy, trials=2)
    assert len(tune(Toy(toy.log, fails="all"), trials=2 + command.HOPELESS + 2).trials) == 2 + command.HOPELESS + 2


def test_a_killed_driver_leaves_no_process_and_a_second_one_is_refused(toy, driver):
    first = driver(pause=60)
    wait_for(lambda: len(at_work(toy)) == 2, first)
    children = psutil.Process(first.pid).children(recursive=True)
    second = driver(pause=60)
    assert f"(process {first.pid} on " in second.communicate(timeout=60)[1] and second.returncode == 1
    first.kill()
    first.communicate()
    processes = [*children, *at_work(toy)]
    assert len(children) >= 3 and psutil.wait_procs(processes, timeout=30)[1] == []


def test_killed_trials_and_a_killed_driver_lose_nothing_and_nothing_is_done_twice(toy, driver, study):
    survives(toy, driver, address(None, root=study.root), trials=16, kills=3, drivers=1)
