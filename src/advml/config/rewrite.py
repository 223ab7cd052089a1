"""Change values in a YAML text, keeping comments and layout, and show the difference."""

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
    """Set the values of dotted keys in a YAML text.

    A mapping replaces all keys of a section. A key that is missing in the text is added at the end of its section; the caller checks
    that the schema has it.
    """
    yaml, apart = _yaml(), re.findall(r"^\n(\w+):", text, re.MULTILINE)
    document, absent = yaml.load(text), {}
    for key, value in values.items():
        if not _put(document, key, value):
            absent[key] = value
    text = _text(yaml, document)
    for key, value in absent.items():
        document = yaml.load(text)  # again, because the previous key may have created the section of this one
        text = _text(yaml, document) if _put(document, key, value) else _with_line(text, key, value)
    for section in apart:  # restore empty lines: ruamel attaches them to the line above, which may have been removed
        text = re.sub(rf"(?<!\n)\n(?={section}:)", "\n\n", text)
    return text


@dataclass(frozen=True)
class Merged:
    """A params.yaml with changed values.

    Attributes:
        text: the new text, with comments and layout kept.
        changes: changed key -> new value.
        difference: unified diff of the texts; '' without changes.
    """

    text: str
    changes: dict[str, Any]
    difference: str


def merge(params: Path, values: dict[str, Any]) -> Merged:
    """Merge proposed values into params.yaml, without writing the file.

    Raises:
        UserError: a key is unknown, or the resulting configuration is not valid.
    """
    before = params.read_text(encoding="utf-8")
    given = flatten(apply(before, [], source=str(params)))
    changes = {key: value for key, value in values.items() if given.get(key, given) != value}  # `given` itself stands for a missing key
    after = rewrite(before, changes) if changes else before
    validate(apply(after, [], source=str(params)), source=f"{params} with the proposal")
    return Merged(after, changes, difference(before, after, str(params)))


def difference(before: str, after: str, name: str) -> str:
    """Unified diff with one line of context; difflib.unified_diff would treat frequent lines, such as `epochs: 2`, as junk."""
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
    """Innermost section of a key that exists, and the remaining parts of the key."""
    *parents, leaf = parts_of(key)
    for done, name in enumerate(parents):
        if not isinstance(document.get(name), CommentedMap):
            return document, [*parents[done:], leaf]
        document = document[name]
    return document, [leaf]


def _nested(parts: list[str], value: Any) -> Any:
    return functools.reduce(lambda inner, name: {name: inner}, reversed(parts), value)


def _put(document: CommentedMap, key: str, value: Any) -> bool:
    """Set a key that exists, or whose section is on one line; returns False for a key that needs a new line."""
    section, rest = _place(document, key)
    if not (rest[0] in section or section.fa.flow_style() or not section):
        return False
    _set(section, rest[0], _nested(rest[1:], value))
    return True


def _set(section: CommentedMap, key: str, value: Any) -> None:
    if not section:  # {} stays on its line
        section.fa.set_flow_style()
    if isinstance(section.get(key), CommentedMap) and isinstance(value, dict):  # in place, to keep its style and comments
        section[key].clear()
        section[key].update(value)
    else:
        section[key] = _in_a_line(value)


def _in_a_line(value: Any) -> Any:
    """Convert a list or mapping to YAML's flow style ([0, 1], {a: 1}), which keeps the key's comment on its line."""
    if not isinstance(value, (list, dict)):
        return value
    found = CommentedSeq(value) if isinstance(value, list) else CommentedMap({key: _in_a_line(inner) for key, inner in value.items()})
    found.fa.set_flow_style()
    return found


def _with_line(text: str, key: str, value: Any) -> str:
    """Add a key to the text at the end of its section, before comments and blank lines that belong to the next one."""
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
