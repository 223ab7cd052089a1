"""One line is one line: no breaks, no terminal escapes, at most 500 characters, whatever is told."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import advml
from advml.cli.errors import guarded
from advml.core.errors import Failure, UserError
from advml.core.messages import LONGEST, one_line, tell

SOURCES = sorted(Path(advml.__file__).parent.rglob("*.py"))


@settings(max_examples=100, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(text=st.text(st.characters(), max_size=700))
def test_every_text_becomes_one_short_printable_line(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1 and len(line) <= LONGEST
    assert not [character for character in line if not character.isprintable() and not character.isspace()]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n  b\r\nc", "a b c"),
        ("two  blanks stay", "two  blanks stay"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("bad name \udcff.png", "bad name \\udcff.png"),
        ("a\x00b\x85c\u2028d", "a\\x00b c d"),
        ("gr\u00fc\u00dfe \u5b57", "gr\u00fc\u00dfe \u5b57"),
    ],
)
def test_a_line_shows_what_it_escapes(text: str, line: str) -> None:
    assert one_line(text) == line


def test_a_long_line_keeps_its_begin_and_its_end() -> None:
    line = one_line("data.path = " + "x" * 10**6 + "; choose another folder")
    assert line.startswith("data.path = xxx") and line.endswith("xxx; choose another folder") and len(line) == LONGEST


def test_a_huge_text_is_shortened_fast_and_between_words() -> None:
    begin = time.process_time()
    line = one_line("no host in " + 10**6 * "a://b:1/ " + "; choose another")
    assert time.process_time() - begin < 2 and line.startswith("no host in a://b") and line.endswith("; choose another")
    for before, after in (("", ""), (60_000 * "x ", ""), ("", 60_000 * " x")):
        assert "S3CRET" not in one_line(f"{before}http://ann:{20_000 * 'S3CRET'}@host{after}; retry")


@pytest.mark.parametrize("error", [UserError, Failure, lambda text: OSError(5, "Input/output error", text)])
def test_an_error_with_a_hostile_name_ends_in_one_line(error, capsys: pytest.CaptureFixture[str]) -> None:
    name = "photos/\x1b]0;owned\x07\ncat.png" + "\n" * 50 + "y" * 5000

    def command() -> None:
        raise error(name)

    with pytest.raises(SystemExit):
        guarded(command)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable() and len(said) <= LONGEST + 1 and said.startswith("advml: photos/")


def test_a_note_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    tell(RuntimeError("API request failed:\n\n<html>\n\x1b[1m503"))
    assert capsys.readouterr().err == "API request failed: <html> \\x1b[1m503\n"


def test_nothing_else_prints_on_stderr() -> None:
    """The traceback of an unforeseen error excepted, and the bars of a terminal."""
    printing = {}
    for path in SOURCES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        direct = [call for call in calls if any(ast.unparse(word.value) == "sys.stderr" for word in call.keywords if word.arg == "file")]
        written = [
            call for call in calls if ast.unparse(call.func) in ("sys.stderr.write", "warnings.warn", "traceback.print_exc", "typer.echo")
        ]
        if direct + written:
            printing[path.name] = len(direct + written)
    assert printing == {"messages.py": 1, "errors.py": 1}


def test_of_several_processes_the_first_alone_prints_notes_and_warnings(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for line in (f"note: {rank}", f"warning: {rank}", f"advml: {rank}"):
            tell(line)
    assert capsys.readouterr().err.splitlines() == ["note: 0", "warning: 0", "advml: 0", "advml: 1"]
