"""Lines for people: every error, warning and note that advml prints on stderr goes through `tell`.

>>> one_line("cannot read 'a\\nb\\x1b[31m'")
"cannot read 'a b\\\\x1b[31m'"
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata

from advml.core.passwords import masked

LONGEST = 500  # characters
HUGE = 50_000  # characters: of what is longer, words in the middle are left out before passwords are looked for
OUTPUT = "ADVML_OUTPUT"  # variable: `quiet` or `verbose`, as -q and -v set it, for this process and those that it starts
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn"}  # control characters, among them ESC; marks that turn the direction of writing; halves of pairs


def one_line(text: object, *, longest: int = LONGEST) -> str:
    """The text in one line of at most `longest` characters, without passwords, control characters and terminal escapes.

    What is too long loses its middle: a message begins with the thing and ends with the remedy.
    """
    line = _BREAKS.sub(" ", masked(_without_middle(str(text))).strip())
    if len(line) > 20 * longest:  # escaping megabytes takes seconds
        line = _shortened(line, 20 * longest)
    line = "".join(_escaped(character) for character in line)
    return line if len(line) <= longest else _shortened(line, longest)


def is_quiet() -> bool:
    """Whether notes and progress are not wanted."""
    return os.environ.get(OUTPUT) == "quiet"


def is_verbose() -> bool:
    """Whether more is wanted: resolved settings, tracebacks."""
    return os.environ.get(OUTPUT) == "verbose"


def tell(text: object) -> None:
    """Print one line on stderr; where it is to be quiet, only errors and warnings."""
    if is_quiet() and not str(text).startswith(("advml: ", "warning: ")):
        return
    print(one_line(text), file=sys.stderr, flush=True)


def _without_middle(text: str) -> str:
    """At most about HUGE characters, but whole words, which may hold a password."""
    first, last = text.find(" ", HUGE // 2), text.rfind(" ", 0, max(len(text) - HUGE // 2, 0))
    return f"{text[:first]} ...{text[last:]}" if 0 < first < last else text


def _shortened(line: str, longest: int) -> str:
    end = 2 * longest // 5
    return f"{line[: longest - end - 5]} ... {line[-end:]}"


def _escaped(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
