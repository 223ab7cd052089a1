"""What is wrong with params.yaml, in one line that names key, value and choices."""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import BaseModel

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
    "tuple_type": "must be a list in brackets",
    "dict_type": "must be a section of `key: value`",
    "too_short": "must hold at least {min_length:g}",
    "too_long": "must hold at most {max_length:g}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
}


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
        return f"unknown key '{key}'; choose from {', '.join(_section(location[:-1], root).model_fields)}"
    if kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "")
        wrong = f"unknown key '{key}'" if "[key]" in error["loc"] else f"{key} = {_shown(error)}"
        return f"{wrong}; choose from {choices}"
    if kind == "model_type":
        return f"{key} = {_shown(error)}; must be a section with the keys {', '.join(_section(location, root).model_fields)}"
    return f"{key} = {_shown(error)}; {REMEDIES.get(kind, error['msg']).format(**context)}"


def _dotted(location: tuple[int | str, ...]) -> str:
    """('views', 'supervised', 'scale', 1) -> views.supervised.scale[1]"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _shown(error: dict[str, Any]) -> str:
    """The value as YAML writes it, cut short: it may be a whole section."""
    value = error["input"]
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _section(location: tuple[int | str, ...], root: type[BaseModel]) -> type[BaseModel]:
    """The model class at an error's location."""
    current: Any = root
    for part in location:
        is_model = isinstance(current, type) and issubclass(current, BaseModel)
        current = current.model_fields[part].annotation if is_model else get_args(current)[1]  # dict[name, model]
    return current
