"""What is wrong with params.yaml, in one line that names key, value and choices."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from advml.passwords import masked

# pydantic's kinds of error -> what the value should be; {names} come from the error's context.
REMEDIES = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of reasonable size",
    "float_type": "must be a number, e.g. 0.1, 1e-3 or 8/255",
    "float_parsing": "must be a number, e.g. 0.1, 1e-3 or 8/255",
    "finite_number": "must be finite",
    "bool_type": "choose from true, false",
    "bool_parsing": "choose from true, false",
    "string_type": "must be text; put it in quotes",
    "string_unicode": "must be text",
    "tuple_type": "must be a list in brackets",
    "dict_type": "must be a section of `key: value`",
    "too_short": "must hold at least {min_length:g}",
    "too_long": "must hold at most {max_length:g}",
    "string_too_long": "must hold at most {max_length:g} characters",
    **dict.fromkeys(("greater_than", "greater_than_equal", "less_than", "less_than_equal"), "must be {range}"),
    "string_pattern_mismatch": "must be {description}",
}
# Words of a range -> what a bound of that kind is called by pydantic and by JSON schemas.
BOUNDS = {
    "at least {:.10g}": ("ge", "minimum"),
    "above {:.10g}": ("gt", "exclusiveMinimum"),
    "at most {:.10g}": ("le", "maximum"),
    "below {:.10g}": ("lt", "exclusiveMaximum"),
}


def first(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several errors, the one to tell: a key that is not known before one that is missing, which it may be meant for."""
    return next((error for error in errors if error["type"] == "extra_forbidden" or "[key]" in error["loc"]), errors[0])


def unknown(key: str, choices: Iterable[str]) -> str:
    """A key that is not known, the one that is spelt most like it, and all."""
    choices = list(choices)
    near = difflib.get_close_matches(key.rpartition(".")[2], choices, n=1)
    return f"unknown key '{key}'; {f'did you mean {near[0]}? ' if near else ''}choose from {', '.join(choices) or 'none'}"


def explain(error: dict[str, Any], root: type[BaseModel]) -> str:
    """One line for one of pydantic's errors (an item of `ValidationError.errors()`) about a `root` model."""
    location = tuple(part for part in error["loc"] if part != "[key]")
    key, kind, context = _dotted(location), error["type"], error.get("ctx", {})
    if kind == "value_error":  # a validator of ours has written the whole line
        return str(context["error"])
    if kind == "missing" and isinstance(location[-1], int):
        return f"{_dotted(location[:-1])} = {_shown(error)}; must hold at least {location[-1] + 1}"
    if kind == "missing":
        return f"{key} is missing; a complete file is printed by: advml preset digits"
    if kind == "extra_forbidden":
        return unknown(key, _section(location[:-1], root).model_fields)
    if kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "")
        return unknown(key, choices.split(", ")) if "[key]" in error["loc"] else f"{key} = {_shown(error)}; choose from {choices}"
    if kind == "model_type":
        return f"{key} = {_shown(error)}; must be a section with the keys {', '.join(_section(location, root).model_fields)}"
    allowed = _schema(location, root.model_json_schema(), "propertyNames" if "[key]" in error["loc"] else None)
    context = context | {"range": _range(allowed), "description": allowed.get("description")}
    return f"{key} = {_shown(error)}; {REMEDIES.get(kind, error['msg']).format(**context)}"


def _schema(location: tuple[int | str, ...], root: dict[str, Any], last: str | None) -> dict[str, Any]:
    """The JSON schema at an error's location, or of the keys there."""
    current = root
    for part in location[:-1] if last else location:
        current = _resolved(current, root)
        items = current.get("prefixItems") or [current.get("items", {})]
        found = items[min(part, len(items) - 1)] if isinstance(part, int) else current.get("properties", {}).get(part)
        current = found or current.get("additionalProperties") or {}
    current = _resolved(current, root)
    return current.get(last, {}) if last else current


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Without references, and of alternatives the one that is not null."""
    schema = schema["anyOf"][0] if "anyOf" in schema else schema
    return root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _range(schema: dict[str, Any]) -> str:
    return " and ".join(words.format(schema[name]) for words, names in BOUNDS.items() for name in names if name in schema)


def _dotted(location: tuple[int | str, ...]) -> str:
    """('views', 'supervised', 'scale', 1) -> views.supervised.scale[1]"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _shown(error: dict[str, Any]) -> str:
    """The value as YAML writes it, cut short: it may be a whole section."""
    value = error["input"]
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    text = masked(text[:10_000])  # much more than is shown, so that no password is cut in the midst there
    return text if len(text) <= 60 else f"{text[:57]}..."


def _section(location: tuple[int | str, ...], root: type[BaseModel]) -> type[BaseModel]:
    """The model class at an error's location."""
    current: Any = root
    for part in location:
        is_model = isinstance(current, type) and issubclass(current, BaseModel)
        current = current.model_fields[part].annotation if is_model else get_args(current)[1]  # dict[name, model]
    return current
