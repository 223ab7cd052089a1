"""Change values and comments in a YAML text without touching anything else of it."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark
from ruamel.yaml.tokens import CommentToken

COMMENT_COLUMN = 32


def rewrite(text: str, values: dict[str, Any], remarks: dict[str, str]) -> str:
    """Put `values` and the comments `remarks` behind the dotted keys of a YAML text.

    A mapping replaces all keys of a section. Raises KeyError if a key is not there.
    """
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null"))
    document = yaml.load(text)
    for key, value in values.items():
        _set(*_place(document, key), value)
    for key, remark in remarks.items():
        _remark(*_place(document, key), remark)
    stream = io.StringIO()
    yaml.dump(document, stream)
    return stream.getvalue()


def _place(document: CommentedMap, key: str) -> tuple[CommentedMap, str]:
    *parents, leaf = key.split(".")
    for name in parents:
        document = document[name]
    return document, leaf


def _set(section: CommentedMap, key: str, value: Any) -> None:
    if isinstance(section[key], CommentedMap):  # filled in place: its style and the comments around it stay
        section[key].clear()
        section[key].update(value)
    else:
        section[key] = _in_a_line(value) if isinstance(value, list) else value


def _in_a_line(values: list[Any]) -> CommentedSeq:
    """[0, 1] behind its key, so that the key's comment stays behind it too."""
    found = CommentedSeq(values)
    found.fa.set_flow_style()
    return found


def _remark(section: CommentedMap, key: str, remark: str) -> None:
    """Replace a line's comment, keeping the blank lines that ruamel counts as part of it."""
    tokens = section.ca.items.setdefault(key, [None, None, None, None])
    blank_lines = "\n" * (tokens[2].value.count("\n") - 1) if tokens[2] else ""
    tokens[2] = CommentToken(f"# {remark}\n{blank_lines}", CommentMark(COMMENT_COLUMN))
