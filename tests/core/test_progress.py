"""Progress: lines where nobody watches, bars on a terminal, and a file for `advml repro`."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest

from advml.core import progress
from advml.core.progress import BOARD, Bar, Board


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
def on_terminal(monkeypatch) -> Callable[..., AbstractContextManager[Terminal]]:
    """`with on_terminal() as terminal:`. Within, stderr is a terminal of 100 `columns`."""
    for name in ("NO_COLOR", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def make(columns: int = 100) -> AbstractContextManager[Terminal]:
        monkeypatch.setenv("COLUMNS", str(columns))
        return contextlib.redirect_stderr(Terminal())

    return make


def frames(terminal: Terminal) -> list[str]:
    """The lines drawn, without colours and moves of the cursor."""
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())) if line.strip()]


def test_a_picture_is_drawn_on_a_terminal_alone_and_not_more_often_than_it_should(on_terminal, clock, capsys):
    drawn = []

    def draw(picture: progress.Redrawn, *times: float) -> None:
        for clock.now in times:
            picture.draw(lambda: drawn.append(clock.now) or f"at {clock.now}")

    with on_terminal() as terminal, progress.Redrawn() as picture:
        draw(picture, 200, 200.4, 200.6, 201.2)
    assert drawn == [200, 200.6, 201.2] and list(dict.fromkeys(frames(terminal))) == [f"at {time}" for time in drawn]
    with progress.Redrawn() as picture:
        draw(picture, 300)
    assert len(drawn) == 3 and capsys.readouterr() == ("", "")


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
    assert first.startswith("pretrain CL-at-s0: 37 %, about 25 s left  loss 151")
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


def test_text_in_brackets_is_shown_as_it_is(on_terminal):
    """A note is no markup of rich."""
    with on_terminal() as terminal, Bar("evaluate", total=4) as bar:
        bar.reach(1, "[red] is a class")
    assert "[red] is a class" in terminal.getvalue()


@pytest.mark.parametrize("columns", [80, 110, 200])
@pytest.mark.parametrize("title", ["prepare", "evaluate_at@SCL-Partial-AT-0", "evaluate mymodels.robust.resnet50-of-yesterday-evening"])
def test_a_bar_keeps_its_width_and_its_line_whatever_is_written_beside_it(on_terminal, columns, title):
    note = "epoch 12/200  loss 1.234  validation/accuracy 0.987  validation/adversarial_accuracy 0.654  and more of the same kind"
    with on_terminal(columns) as terminal, Bar(title, total=4) as bar:
        bar.reach(2, note)
        bar.bars.refresh()
    half, whole = (next(line for line in frames(terminal) if share in line) for share in (" 50 %", "100 %"))
    for line in (half, whole):
        assert len(line) <= columns and note[:5] in line
        assert line.startswith(title[:20]) and (title in line or "…" in line)
        assert sum(line.count(cell) for cell in "━╸╺") >= 16
    assert columns < 200 or note[:60] in half


@pytest.mark.parametrize("done", [99, 100, 120])
def test_all_is_shown_when_the_work_is_done_and_never_before(on_terminal, done):
    """Whatever is counted: files are still to be written after the last unit, and a total may have been too small."""
    with on_terminal() as terminal, Bar("evaluate", total=100) as bar:
        bar.reach(done)
        bar.bars.refresh()
        assert "99 %" in frames(terminal)[-1] and "100 %" not in terminal.getvalue()
    assert "100 %" in frames(terminal)[-1]


def test_work_that_turns_out_to_be_less_ends_with_all_of_it(on_terminal):
    with on_terminal() as terminal, Bar("evaluate", total=100) as bar:
        bar.reach(86)
    assert "100 %" in frames(terminal)[-1]


def test_a_bar_that_an_error_has_ended_stays_where_it_was(on_terminal):
    with pytest.raises(RuntimeError), on_terminal() as terminal, Bar("evaluate", total=100) as bar:
        bar.reach(86)
        raise RuntimeError
    assert "86 %" in frames(terminal)[-1]


def test_a_part_counts_when_the_next_one_begins(on_terminal):
    with on_terminal() as terminal, Bar("represent", total=2) as bar:
        for part, share in (("features", "0 %"), ("probes", "50 %")):
            bar.begin(part)
            bar.bars.refresh()
            assert share in frames(terminal)[-1] and part in frames(terminal)[-1]
    assert "100 %" in frames(terminal)[-1]


def test_lines_do_not_speak_of_all_before_the_end_either(clock, capsys):
    with Bar("pretrain", total=1000) as bar:
        bar.reach(0)
        clock.now += 20
        bar.reach(999)
    assert capsys.readouterr().err.startswith("pretrain: 99 %, ")


# The board of `advml repro`


@pytest.fixture
def report(tmp_path) -> Callable[..., None]:
    """report("prepare", "half way", 1, 2) is what a stage's process writes."""

    def write(stage: str, note: str, done: int, total: int) -> None:
        (tmp_path / f"{stage}.progress").write_text(json.dumps({"title": f"{stage} digits", "done": done, "total": total, "note": note}))

    return write


def test_a_board_without_a_terminal_prints_a_line_per_finished_stage(tmp_path, report, clock, capsys):
    with Board(total=3, folder=tmp_path) as board:
        board.show("prepare")
        clock.now += 2.4
        board.finish("prepare", ok=True)
        report("pretrain_st@CL-0", "", 1, 2)
        board.show("pretrain_st@CL-0")
        clock.now += 61
        board.finish("pretrain_st@CL-0", ok=False)
    assert capsys.readouterr().err.splitlines() == ["[1/3] prepare: done in 2 s", "[2/3] pretrain_st@CL-0: FAILED in 61 s"]


def test_a_board_on_a_terminal_shows_every_stage_at_work_and_all_of_them_together(on_terminal, tmp_path, report):
    with on_terminal() as terminal, Board(total=4, folder=tmp_path) as board:
        board.show("prepare")
        assert "starting" in refreshed(board, terminal)
        report("prepare", "half way", 1, 2)
        board.show("prepare")
        shown = refreshed(board, terminal)
        assert "prepare digits" in shown and "50 %" in shown and "half way" in shown and "all stages" in shown
        (tmp_path / "prepare.progress").write_text('{"title": "the wo')
        board.show("prepare")
        assert "half way" in refreshed(board, terminal)  # half a file changes nothing
        board.finish("prepare", ok=True)
        shown = refreshed(board, terminal)
        assert "half way" not in shown.rpartition("all stages")[2] and "25 %" in shown
    assert "[1/4] prepare: done in 0 s" in terminal.getvalue()


def refreshed(board: Board, terminal: Terminal) -> str:
    """What a refresh draws."""
    start = len(terminal.getvalue())
    board.bars.refresh()
    return terminal.getvalue()[start:]
