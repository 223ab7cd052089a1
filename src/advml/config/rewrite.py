"""Change values in a YAML text and leave all else of it, comments included, as it is; and show what has changed."""

from __future__ import annotations

import difflib
import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from advml.config.loading import apply, flatten, parts_of, validate


def rewrite(text: str, values: dict[str, Any]) -> str:
    """Put values behind the dotted keys of a YAML text.

    A mapping replaces all keys of a section. A key that the text does not have is added at the end of its section; whether there is
    such a key is for the caller to check.
    """
    yaml, apart = _yaml(), re.findall(r"^\n(\w+):", text, re.MULTILINE)
    document, absent = yaml.load(text), {}
    for key, value in values.items():
        if not _put(document, key, value):
            absent[key] = value
    text = _text(yaml, document)
    for key, value in absent.items():
        document = yaml.load(text)  # anew: the key before may have made the section of this one
        text = _text(yaml, document) if _put(document, key, value) else _with_line(text, key, value)
    for section in apart:  # ruamel takes an empty line for a part of the line above, which may have gone
        text = re.sub(rf"(?<!\n)\n(?={section}:)", "\n\n", text)
    return text


@dataclass(frozen=True)
class Merged:
    """A params.yaml with other values in it.

    Attributes:
        text: comments and all else as they were.
        changes: the keys that get another value, with it.
        difference: of the texts, for review; '' without changes.
    """

    text: str
    changes: dict[str, Any]
    difference: str


def merge(params: Path, values: dict[str, Any]) -> Merged:
    """params.yaml with the values of a proposal; nothing is written.

    Raises:
        UserError: one of the keys is unknown, or the values do not go together.
    """
    before = params.read_text(encoding="utf-8")
    given = flatten(apply(before, [], source=str(params)))
    changes = {key: value for key, value in values.items() if given.get(key, given) != value}  # an absent key is like no value
    after = rewrite(before, changes) if changes else before
    validate(apply(after, [], source=str(params)), source=f"{params} with the proposal")
    return Merged(after, changes, difference(before, after, str(params)))


def difference(before: str, after: str, name: str) -> str:
    """A unified diff with a line of context. difflib's own takes lines that are frequent in a long text, as `epochs: 2`, for noise."""
    old, new = before.splitlines(), after.splitlines()
    lines = [f"--- {name}", f"+++ {name} (proposed)"]
    for group in difflib.SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(1):
        first, last = group[0], group[-1]
        lines.append(f"@@ -{first[1] + 1},{last[2] - first[1]} +{first[3] + 1},{last[4] - first[3]} @@")
        for tag, i, j, k, m in group:
            if tag == "equal":
                lines += [f" {line}" for line in old[i:j]]
            else:
                lines += [f"-{line}" for line in old[i:j]] + [f"+{line}" for line in new[k:m]]
    return "".join(f"{line}\n" for line in lines) if len(lines) > 2 else ""


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def _text(yaml: YAML, document: Any) -> str:
    stream = io.StringIO()
    yaml.dump(document, stream)
    return stream.getvalue()


def _place(document: CommentedMap, key: str) -> tuple[CommentedMap, list[str]]:
    """The innermost section that is there, and what remains of the key's parts."""
    *parents, leaf = parts_of(key)
    for done, name in enumerate(parents):
        if not isinstance(document.get(name), CommentedMap):
            return document, [*parents[done:], leaf]
        document = document[name]
    return document, [leaf]


def _nested(parts: list[str], value: Any) -> Any:
    return functools.reduce(lambda inner, name: {name: inner}, reversed(parts), value)


def _put(document: CommentedMap, key: str, value: Any) -> bool:
    """Set a key that is there, or in a section on one line; False for one that needs a line of its own."""
    section, rest = _place(document, key)
    if not (rest[0] in section or section.fa.flow_style() or not section):
        return False
    _set(section, rest[0], _nested(rest[1:], value))
    return True


def _set(section: CommentedMap, key: str, value: Any) -> None:
    if not section:  # {} stays in its line
        section.fa.set_flow_style()
    if isinstance(section.get(key), CommentedMap) and isinstance(value, dict):  # filled in place: its style and the comments around it stay
        section[key].clear()
        section[key].update(value)
    else:
        section[key] = _in_a_line(value)


def _in_a_line(value: Any) -> Any:
    """[0, 1] or {a: 1} behind its key, so that the key's comment stays behind it too."""
    if not isinstance(value, (list, dict)):
        return value
    found = CommentedSeq(value) if isinstance(value, list) else CommentedMap({key: _in_a_line(inner) for key, inner in value.items()})
    found.fa.set_flow_style()
    return found


def _with_line(text: str, key: str, value: Any) -> str:
    """The text with one more key at the end of its section, before the comments and blank lines that lead to the next one."""
    section, rest = _place(_yaml().load(text), key)
    column, first = section.lc.col, min(line for line, *_ in section.lc.data.values())
    lines = text.splitlines(keepends=True)
    last = first
    for number, line in enumerate(lines[first:], first):
        content = line.strip()
        if content and not content.startswith("#"):
            if len(line) - len(line.lstrip()) < column:
                break
            last = number
    added = _text(_yaml(), CommentedMap({rest[0]: _in_a_line(_nested(rest[1:], value))}))
    return "".join([*lines[:last], lines[last].rstrip("\n") + "\n", " " * column + added, *lines[last + 1 :]])
