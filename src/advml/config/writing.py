"""A params.yaml from values: order and comments are the schema's.

    >>> print(write({"seeds": [0], "threat_model": {"norm": "linf", "epsilon": "8/255"}}))
    seeds: [0]                      # one model per scheme, regime and seed
    <BLANKLINE>
    threat_model:                   # the ball that bounds every perturbation
      norm: linf                    # linf, l2
      epsilon: 8/255                # images live in [0, 1]

And the JSON schema by which editors explain and complete the keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from advml.config import loading
from advml.config.schema import Config
from advml.config.values import Section
from advml.core.io import to_yaml

COMMENT_COLUMN = 32
WIDTH = 140


def write(raw: Mapping[str, Any], remarks: Mapping[str, str] | None = None, *, full: bool = False) -> str:
    """The text of a params.yaml.

    Args:
        raw: a valid mapping as YAML gives it, or part of one; `8/255` may be text.
        remarks: comments by dotted key, in place of the schema's.
        full: also the keys that keep their defaults; else those of `raw` alone.
    """
    return "\n".join(_Writer(remarks or {}, full).section(Config, raw)).lstrip("\n") + "\n"


@dataclass
class _Writer:
    remarks: Mapping[str, str]
    full: bool
    explained: set[type] = field(default_factory=set)

    def section(self, model: type[Section], values: Mapping[str, Any], path: str = "") -> Iterator[str]:
        """The lines inside of a section. Keys that several sections share are explained in the first one of them."""
        explained, indent = model in self.explained, "  " * path.count(".")
        self.explained.add(model)
        for name, about in model.model_fields.items():
            if name not in values and not self.full:
                continue
            key, (inner, rows) = f"{path}{name}", _kinds(about.annotation)
            value = values[name] if name in values else {} if inner else about.get_default(call_default_factory=True)
            comment = self.remarks.get(key) or ("" if explained else about.description)
            if not path:
                yield ""
            if inner:
                yield from self.entry(inner, key, value, comment)
            elif rows or name == "space":
                yield _line(f"{indent}{name}:", comment)
                for one, held in value.items():
                    yield from self.entry(rows, f"{key}.{one}", held, "") if rows else [f"{indent}  {one}: {_flow(held)}"]
            else:
                yield _line(f"{indent}{name}: {_flow(value)}", comment)

    def entry(self, model: type[Section], key: str, values: Mapping[str, Any], comment: str) -> Iterator[str]:
        """A section inside of another one has a line, where it fits; others have a line for each key."""
        path, _, name = key.rpartition(".")
        code = f"{'  ' * key.count('.')}{name}:"
        line = f"{code} {_flow({one: values[one] for one in model.model_fields if one in values})}"
        if path and not self.full and len(line) <= WIDTH and not any(isinstance(held, Mapping) for held in values.values()):
            yield line
        else:
            yield _line(code, comment)
            yield from self.section(model, values, f"{key}.")


def _kinds(annotation: Any) -> tuple[type[Section] | None, type[Section] | None]:
    """The class of a section; of a section of named sections, such as `pretrain`, that of each of them."""
    inner = get_args(annotation)[-1] if get_origin(annotation) is dict else annotation
    found = inner if isinstance(inner, type) and issubclass(inner, Section) else None
    return (None, found) if get_origin(annotation) is dict else (found, None)


def _line(code: str, comment: str) -> str:
    return f"{code:<{COMMENT_COLUMN - 1}} # {comment}" if comment else code


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    return to_yaml({"": value}, flow=True).strip().partition(": ")[2][:-1]


# For editors

FRACTION = r"^\s*[0-9.]+([eE][-+]?[0-9]+)?\s*(/\s*[0-9.]+\s*)?$"
BOUNDS = dict(loading.BOUNDS.values())  # pydantic's names -> those of JSON schemas
ONE_WORD = (("Similarity", "layers"), ("Corruptions", "names"))  # lists that may be written as one word


def editor_schema() -> str:
    """The JSON schema of params.yaml, a definition a line. What a file may write counts: fractions, words in place of lists."""
    schema = _for_editors(Config.model_json_schema())
    for section, key in ONE_WORD:
        found = schema["$defs"][section]["properties"][key]
        schema["$defs"][section]["properties"][key] = {"description": found.pop("description"), "anyOf": [found, {"type": "string"}]}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "params.yaml of advml"}
    rows = {"$defs": schema.pop("$defs"), "properties": schema.pop("properties")}
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (head | schema).items()]
    for name, inner in rows.items():
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in inner.items())
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _for_editors(schema: Any) -> Any:
    """In the words of JSON schema alone; named sections listed, so that an editor proposes them; numbers also as fractions."""
    if isinstance(schema, list):
        return [_for_editors(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {BOUNDS.get(key, key): _for_editors(value) for key, value in schema.items()}
    names = found.pop("propertyNames", {}).get("enum")
    if names:
        found |= {"properties": dict.fromkeys(names, found["additionalProperties"]), "additionalProperties": False}
    for key in ("title", "form", "max_length"):
        found.pop(key, None)
    if isinstance(found.get("type"), str):  # a schema, and no section with a key called `type`
        if r"\p" in found.get("pattern", ""):  # not every editor's regular expressions know Unicode's classes
            del found["pattern"]
        if found["type"] == "number":
            said = {key: found.pop(key) for key in ("description", "default") if key in found}
            return said | {"anyOf": [found, {"type": "string", "pattern": FRACTION}]}
    return found
