"""Messages on stderr: `tell` prints every error, warning and note, in one line.

>>> one_line("cannot read 'a\\nb\\x1b[31m'")
"cannot read 'a b\\\\x1b[31m'"
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Sequence

from advml.core.passwords import masked

LONGEST = 500  # characters of a message
HUGE = 50_000  # characters: words in the middle of longer texts are dropped before passwords are searched
OUTPUT = "ADVML_OUTPUT"  # environment variable, `quiet` or `verbose`: set by -q and -v for this process and those that it starts
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn"}  # Unicode categories: control characters (such as ESC), direction marks, surrogates


def one_line(text: object, *, longest: int = LONGEST) -> str:
    """Reduce text to one line of at most `longest` characters, without passwords, control characters and terminal escapes.

    Long texts are cut in the middle, because a message begins with its subject and ends with the remedy.
    """
    line = _BREAKS.sub(" ", masked(_without_middle(str(text))).strip())
    if len(line) > 20 * longest:  # shorten first: escaping megabytes takes seconds
        line = _shortened(line, 20 * longest)
    line = "".join(_escaped(character) for character in line)
    return line if len(line) <= longest else _shortened(line, longest)


def first_of(names: Sequence[str], most: int, *, between: str = ", ") -> str:
    """Enumeration of the first names: `a, b and 17 more`, or all of them if there are at most `most`."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_quiet() -> bool:
    """Whether -q suppresses notes and progress."""
    return os.environ.get(OUTPUT) == "quiet"


def is_verbose() -> bool:
    """Whether -v asks for resolved settings and tracebacks."""
    return os.environ.get(OUTPUT) == "verbose"


def tell(text: object) -> None:
    """Print one line on stderr; under -q, only errors and warnings; in torchrun's processes other than the first, only errors."""
    kinds = ("advml: ",) if os.environ.get("RANK", "0") != "0" else ("advml: ", "warning: ") if is_quiet() else ("",)
    if str(text).startswith(kinds):
        print(one_line(text), file=sys.stderr, flush=True)


def _without_middle(text: str) -> str:
    """Drop words in the middle of a text, to about HUGE characters; words stay whole, so that a password in one is still recognised."""
    first, last = text.find(" ", HUGE // 2), text.rfind(" ", 0, max(len(text) - HUGE // 2, 0))
    return f"{text[:first]} ...{text[last:]}" if 0 < first < last else text


def _shortened(line: str, longest: int) -> str:
    end = 2 * longest // 5
    return f"{line[: longest - end - 5]} ... {line[-end:]}"


def _escaped(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
