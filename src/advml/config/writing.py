"""Write values as a params.yaml, with the order and comments of the schema, and write the JSON schema for editors.

>>> print(write({"seeds": [0], "threat_model": {"norm": "linf", "epsilon": "8/255"}}))
seeds: [0]                      # one model per scheme, regime and seed
<BLANKLINE>
threat_model:                   # the ball that bounds every perturbation
  norm: linf                    # linf, l2
  epsilon: 8/255                # images live in [0, 1]
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
    """Text of a params.yaml.

    Args:
        raw: a valid configuration, or part of one, as parsed from YAML; fractions may be text ("8/255").
        remarks: comments by dotted key, which replace those of the schema.
        full: write all keys, with their defaults; else only those of `raw`.
    """
    return "\n".join(_Writer(remarks or {}, full).section(Config, raw)).lstrip("\n") + "\n"


@dataclass
class _Writer:
    remarks: Mapping[str, str]
    full: bool
    explained: set[type] = field(default_factory=set)

    def section(self, model: type[Section], values: Mapping[str, Any], path: str = "") -> Iterator[str]:
        """Lines of a section's keys. Of several sections of one kind, only the first has comments."""
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
        """Lines of a section with its name: one line for a nested section that is short enough, else one per key."""
        path, _, name = key.rpartition(".")
        code = f"{'  ' * key.count('.')}{name}:"
        line = f"{code} {_flow({one: values[one] for one in model.model_fields if one in values})}"
        if path and not self.full and len(line) <= WIDTH and not any(isinstance(held, Mapping) for held in values.values()):
            yield line
        else:
            yield _line(code, comment)
            yield from self.section(model, values, f"{key}.")


def _kinds(annotation: Any) -> tuple[type[Section] | None, type[Section] | None]:
    """(class of a section, None); or (None, class of each entry) for a section of named sections, such as `pretrain`."""
    inner = get_args(annotation)[-1] if get_origin(annotation) is dict else annotation
    found = inner if isinstance(inner, type) and issubclass(inner, Section) else None
    return (None, found) if get_origin(annotation) is dict else (found, None)


def _line(code: str, comment: str) -> str:
    return f"{code:<{COMMENT_COLUMN - 1}} # {comment}" if comment else code


def _flow(value: Any) -> str:
    """YAML of a value in one line."""
    return to_yaml({"": value}, flow=True).strip().partition(": ")[2][:-1]


# For editors

FRACTION = r"^\s*[0-9.]+([eE][-+]?[0-9]+)?\s*(/\s*[0-9.]+\s*)?$"
BOUNDS = dict(loading.BOUNDS.values())  # pydantic's names -> those of JSON schemas
ONE_WORD = (("Similarity", "layers"), ("Corruptions", "names"))  # lists that may be written as one word


def editor_schema() -> str:
    """JSON schema of params.yaml, one definition per line. It accepts all notations of the file: fractions, a word instead of a list."""
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
    """Convert pydantic's schema to plain JSON schema: lists the names of sections, for completion, and accepts fractions as numbers."""
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
    if isinstance(found.get("type"), str):  # a schema, not a section that has a key called `type`
        if r"\p" in found.get("pattern", ""):  # some editors' regular expressions lack Unicode classes
            del found["pattern"]
        if found["type"] == "number":
            said = {key: found.pop(key) for key in ("description", "default") if key in found}
            return said | {"anyOf": [found, {"type": "string", "pattern": FRACTION}]}
    return found
