"""Progress: lines where nobody watches, bars on a terminal, and a file for `advml repro`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest

from advml import progress
from advml.progress import BOARD, Bar, Board


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock))
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch) -> Callable[[], AbstractContextManager[Terminal]]:
    """`with on_terminal() as terminal:`. Within, stderr is a terminal of 100 columns."""
    for name in ("NO_COLOR", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return lambda: contextlib.redirect_stderr(Terminal())


# Without a terminal


def test_without_a_terminal_there_is_a_line_now_and_then_and_one_at_the_end(clock, capsys):
    with Bar("pretrain CL-at-s0", total=400) as bar:
        bar.reach(0)
        for done in range(1, 201):
            clock.now += 0.1  # 20 s in all: one line is due
            bar.reach(done, f"loss {done}")
    told = capsys.readouterr()
    assert told.out == ""
    first, last = told.err.splitlines()
    assert first.startswith("pretrain CL-at-s0: 38 %, about 25 s left  loss 151")
    assert last == "pretrain CL-at-s0: done in 20 s  loss 200"


def test_what_an_earlier_process_had_done_does_not_count_as_this_ones_speed(clock, capsys):
    with Bar("finetune", total=1000) as bar:
        bar.reach(900)
        clock.now += 20
        bar.reach(910)
    assert "91 %, about 180 s left" in capsys.readouterr().err  # 0.5 per second, 90 to go


def test_a_bar_that_stands_still_promises_nothing(clock, capsys):
    with Bar("evaluate", total=10) as bar:
        bar.reach(5)
        clock.now += 20
        bar.reach(5, "waiting")
    assert capsys.readouterr().err.splitlines()[0] == "evaluate: 50 %  waiting"


def test_after_an_error_nothing_claims_to_be_done(capsys):
    with pytest.raises(RuntimeError), Bar("pretrain", total=3) as bar:
        bar.advance()
        raise RuntimeError
    assert capsys.readouterr().err == ""


def test_advance_counts_on(capsys):
    with Bar("evaluate", total=5) as bar:
        for _ in range(3):
            bar.advance(1, "clean")
        bar.advance(2)
    assert bar.done == 5 and bar.note == "clean"


# The file that `advml repro` reads


def test_under_repro_the_state_goes_to_the_file_and_not_to_the_screen(tmp_path, monkeypatch, clock, on_terminal):
    monkeypatch.setenv(BOARD, str(tmp_path / "board"))
    with on_terminal() as terminal, Bar("pretrain CL-at-s0", total=400) as bar:
        bar.reach(1, "epoch 1/40  loss 1.234")
        assert json.loads((tmp_path / "board").read_text()) == {
            "title": "pretrain CL-at-s0",
            "done": 1,
            "total": 400,
            "note": "epoch 1/40  loss 1.234",
        }
        bar.reach(2)
        assert json.loads((tmp_path / "board").read_text())["done"] == 1  # at most five times a second
        clock.now += 1
        bar.reach(3)
        assert json.loads((tmp_path / "board").read_text())["done"] == 3
    assert "%" not in terminal.getvalue()


def test_a_file_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch, clock):
    monkeypatch.setenv(BOARD, str(tmp_path / "gone" / "board"))
    with Bar("pretrain", total=2) as bar:
        clock.now += 1
        bar.reach(1)
    assert bar.done == 1


# On a terminal


def test_on_a_terminal_there_is_a_bar_with_title_share_and_note(on_terminal):
    with on_terminal() as terminal, Bar("evaluate CL-AT-s0", total=4) as bar:
        bar.reach(1, "clean 0.975")
    shown = terminal.getvalue()
    assert "evaluate CL-AT-s0" in shown and "25 %" in shown and "clean 0.975" in shown


def test_text_in_brackets_is_shown_as_it_is(on_terminal):
    """A note is no markup of rich."""
    with on_terminal() as terminal, Bar("evaluate", total=4) as bar:
        bar.reach(1, "[red] is a class")
    assert "[red] is a class" in terminal.getvalue()


# The board of `advml repro`


def test_a_board_without_a_terminal_prints_a_line_per_finished_stage(capsys):
    with Board(total=3) as board:
        board.show("prepare", {})
        board.finish("prepare", ok=True, seconds=2.4)
        board.show("pretrain_st@CL-0", {"title": "pretrain CL-st-s0", "done": 1, "total": 2, "note": ""})
        board.finish("pretrain_st@CL-0", ok=False, seconds=61)
    assert capsys.readouterr().err.splitlines() == ["[1/3] prepare: done in 2 s", "[2/3] pretrain_st@CL-0: FAILED in 61 s"]


def test_a_board_on_a_terminal_shows_every_stage_at_work_and_all_of_them_together(on_terminal):
    with on_terminal() as terminal, Board(total=4) as board:
        board.show("prepare", {})
        assert "starting" in refreshed(board, terminal)
        board.show("prepare", {"title": "prepare digits", "done": 1, "total": 2, "note": "half way"})
        shown = refreshed(board, terminal)
        assert "prepare digits" in shown and "50 %" in shown and "half way" in shown and "all stages" in shown
        board.finish("prepare", ok=True, seconds=1)
        shown = refreshed(board, terminal)
        assert "half way" not in shown.rpartition("all stages")[2] and "25 %" in shown
    assert "[1/4] prepare: done in 1 s" in terminal.getvalue()


def refreshed(board: Board, terminal: Terminal) -> str:
    """What a refresh draws."""
    start = len(terminal.getvalue())
    board.bars.refresh()
    return terminal.getvalue()[start:]
