"""Read params.yaml with overrides, validate it, and explain mistakes in one line; print, change and fingerprint configurations."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from advml.config.schema import Config
from advml.config.values import SPACE_KINDS, Section
from advml.core.errors import UserError
from advml.core.io import to_yaml
from advml.core.passwords import masked, remember

LONGEST = 1_000_000  # most characters of a params.yaml
MOST_VALUES = 100_000  # most values in it, with aliases expanded
DEEPEST = 30  # most levels of nested sections and lists

S = TypeVar("S", bound=BaseModel)


def load(path: str | Path = "params.yaml", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read params.yaml, apply `key=value` overrides, validate.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings; the value is read as YAML, so lists and null work.
    Raises:
        UserError: one line naming file, key, value and choices.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; work in the folder of a study, or create one with: advml init digits") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a null character
        raise UserError(f"{path} cannot be read: {error}") from None
    if len(text) > LONGEST:
        raise UserError(f"{path} has more than {LONGEST} characters; a configuration has some thousands: advml preset digits > {path}")
    for override in overrides:
        if override.lstrip(" +").startswith("tracking"):
            remember(override)
    raw = apply(text, overrides, source=str(path))
    if isinstance(tracking := raw.get("tracking"), dict):
        remember(str(tracking.get("uri")))
    return validate(raw, source=str(path), overrides=overrides)


def apply(text: str, overrides: list[str] | tuple[str, ...], *, source: str = "params.yaml") -> dict[str, Any]:
    """Parse a YAML text and apply `key=value` overrides; returns a mapping that is not validated yet."""
    raw = _parse_yaml(text, source=source)
    if not isinstance(raw, dict):
        raise UserError(f"{source} is not a mapping of sections; print a complete one with: advml preset digits")
    for override in overrides:
        put(raw, dict([parse_override(override)]), prefix="-S ")
    return raw


def validate(raw: dict[str, Any], *, source: str = "params.yaml", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Convert a mapping, to which `overrides` were applied, to a Config; raises UserError with one line if it is not valid."""
    try:
        return section(Config, raw)
    except UserError as error:
        raise UserError(f"{_culprit(str(error), overrides) or source}: {error}") from None


def section(kind: type[S], values: Mapping[str, Any]) -> S:
    """Section of these values; raises UserError with one line that begins with the key if they are not valid."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(first(error.errors()), kind)) from None


def _culprit(line: str, overrides: list[str] | tuple[str, ...]) -> str | None:
    """Last override of the key that an error message begins with; None: the key was not overridden."""
    key = line.removeprefix("unknown key '")
    return next((f"-S {one}" for one in reversed(overrides) if re.match(rf"{re.escape(one.partition('=')[0].strip(' +'))}\b", key)), None)


def changed(config: Config, values: Mapping[str, Any], *, source: str = "params.yaml") -> Config:
    """Configuration with these values (by dotted keys) replaced; validated like a file.

    Raises:
        UserError: one line naming key, value and choices.
    """
    return validate(put(config.model_dump(mode="json"), values), source=source)


def dump(config: Config) -> str:
    """YAML of the resolved configuration, in the order of params.yaml."""
    return to_yaml(config.model_dump(mode="json"))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {'a': {'b': 1}} -> {'a.b': 1}; lists stay values."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()}


def digest(*parts: Any) -> str:
    """Stable fingerprint (16 hex digits) of JSON-like values and pydantic models."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=64)  # a params.yaml takes 15 ms, and a command may load it several times
def _as_json(text: str) -> str:
    """Convert YAML text to JSON: aliases become copies, so that an override changes only one of them, and dates become text."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    _check_depth(text)
    try:
        found = YAML(typ="safe").load(text)  # uses libyaml if installed, which is four times as fast
    except YAMLError:  # libyaml does not accept {uri: http://...}, and explains errors less well
        found = YAML(typ="safe", pure=True).load(text)
    return json.dumps(_plain(found, left=itertools.count(1)))


def _check_depth(text: str) -> None:
    """Raise if the text is nested too deeply, before it is loaded: libyaml recurses per level, and would crash the process."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    depth = 0
    try:
        for event in YAML(typ="safe").parse(text):
            name = type(event).__name__
            depth += name.endswith("StartEvent") - name.endswith("EndEvent")
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} levels deep")
    except YAMLError:  # loading will report the error; the part before it is not too deep
        pass


def _plain(value: Any, *, left: Iterator[int], depth: int = 0) -> Any:
    """Copy a parsed YAML value as plain dictionaries, lists and scalars, with aliases expanded.

    Raises:
        ValueError: there are too many values, or one contains itself; a few lines of aliases can expand beyond the memory.
    """
    if next(left) > MOST_VALUES or depth > DEEPEST:
        raise ValueError(f"aliases repeat one another: more than {MOST_VALUES} values, or {DEEPEST} levels")
    if isinstance(value, Mapping):
        keys = [key if isinstance(key, str) else json.dumps(key, default=str) for key in value]
        if len({*keys}) < len(keys):
            raise ValueError(f"a section has a key twice, once as a number and once as text: {', '.join(sorted(keys))}")
        return {key: _plain(inner, left=left, depth=depth + 1) for key, inner in zip(keys, value.values(), strict=True)}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, left=left, depth=depth + 1) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return json.loads(_as_json(text))
    except Exception as error:  # ruamel.yaml raises KeyError, OverflowError, ... for a value that does not match its tag
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark and "\n" in text else ""
        reason = (getattr(error, "problem", None) or str(error)).partition("\n")[0]
        reason = reason if " " in reason else f"{type(error).__name__} {reason}"
        reason += "; use spaces" if "\\t" in reason else ""
        raise UserError(f"{source} is not valid YAML: {place}{reason}") from None


def parse_override(override: str) -> tuple[str, Any]:
    """Parse an override: `a.b=[1, 2]` -> ("a.b", [1, 2]); the value is read as YAML.

    A leading `+`, which `dvc exp run -S` needs for keys missing from params.yaml, is ignored.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip(" +"):
        raise UserError(f"-S {override} is not of the form key=value, e.g. -S threat_model.epsilon=8/255")
    return key.strip(" +"), _parse_yaml(value, source=f"-S {override}")


def put(raw: dict[str, Any], values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Set dotted keys of a mapping in place, and return it; missing sections are created if the schema has them.

    Raises:
        UserError: a section is unknown. The last part of a key, and its value, are checked later, by `validate`.
    """
    for key, value in values.items():
        node, schema = raw, Config
        *parents, leaf = parts_of(key)
        for done, name in enumerate(parents, 1):
            path, below = ".".join(parents[:done]), _below(schema, name)
            if name not in node and below is None:
                raise UserError(f"{prefix}{key}: {unknown(path, _names(schema))}")
            if not isinstance(node.setdefault(name, {}), dict):
                raise UserError(f"{prefix}{key}: '{path}' is a value, not a section")
            node, schema = node[name], below
        node[leaf] = value
    return raw


def _names(schema: Any) -> tuple[str, ...]:
    """Keys of a section; empty if the schema allows any."""
    if isinstance(schema, type) and issubclass(schema, Section):
        return tuple(schema.model_fields)
    return get_args(get_args(schema)[0]) if get_args(schema) else ()


def _below(schema: Any, name: str) -> Any:
    """Type of a key of a section; None if the section has no such key."""
    if isinstance(schema, type) and issubclass(schema, Section):
        return schema.model_fields[name].annotation if name in schema.model_fields else None
    if get_origin(schema) is dict and get_origin(get_args(schema)[0]) is Literal:
        return get_args(schema)[1] if name in _names(schema) else None
    return dict  # a section of any keys


def is_default(key: str, value: Any) -> bool:
    """Whether a key of params.yaml may be left out, and this value (as in JSON) is its default."""
    schema: Any = Config
    *parents, leaf = parts_of(key)
    for name in parents:
        schema = _below(schema, name)
    field = schema.model_fields.get(leaf) if isinstance(schema, type) and issubclass(schema, Section) else None
    if field is None or field.is_required():
        return False
    default = field.get_default(call_default_factory=True)
    return value == (list(default) if isinstance(default, tuple) else default)


def parts_of(key: str) -> list[str]:
    """Split a dotted key; keys of a search space contain dots: `tune.pretrain.space.view.shift` -> tune, pretrain, space, view.shift.

    A last part that is a kind of range, as in `tune.pretrain.space.view.shift.float`, is separate again.
    """
    parts = key.split(".")
    if len(parts) < 5 or parts[0] != "tune" or parts[2] != "space":
        return parts
    kind = parts[-1:] if parts[-1] in SPACE_KINDS else []
    return [*parts[:3], ".".join(parts[3 : len(parts) - len(kind)]), *kind]


# Error messages: one line that names key, value and choices

# pydantic's kind of error -> requirement on the value; {names} are filled from the error's context.
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
    "string_type": "must be text in quotes",
    "string_unicode": "must be text",
    "tuple_type": "must be a list in brackets",
    "dict_type": "must be a section of `key: value`",
    "too_short": "must have {min_length:g} or more entries",
    "too_long": "must have {max_length:g} or fewer entries",
    "string_too_long": "must have at most {max_length:g} characters",
    **dict.fromkeys(("greater_than", "greater_than_equal", "less_than", "less_than_equal"), "must be {range}"),
    "string_pattern_mismatch": "must be {form}",
}
# Wording of a bound -> its name in pydantic and in JSON schema.
BOUNDS = {
    "at least {:.10g}": ("ge", "minimum"),
    "above {:.10g}": ("gt", "exclusiveMinimum"),
    "at most {:.10g}": ("le", "maximum"),
    "below {:.10g}": ("lt", "exclusiveMaximum"),
}


def first(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Error to report: an unknown key before a missing one, since it may be a misspelling of it."""
    return next((error for error in errors if error["type"] == "extra_forbidden" or "[key]" in error["loc"]), errors[0])


def unknown(key: str, choices: Iterable[str]) -> str:
    """Message for an unknown key: the most similar key, and all choices."""
    choices = list(choices)
    near = difflib.get_close_matches(key.rpartition(".")[2], choices, n=1)
    return f"unknown key '{key}'; {f'did you mean {near[0]}? ' if near else ''}choose from {', '.join(choices) or 'none'}"


def explain(error: dict[str, Any], root: type[BaseModel]) -> str:
    """Message of one line for one pydantic error (an item of `ValidationError.errors()`) about a `root` model."""
    location = tuple(part for part in error["loc"] if part != "[key]")
    key, kind, context = _dotted(location), error["type"], error.get("ctx", {})
    if kind == "value_error":  # from one of the schema's own validators, which write the whole line
        return str(context["error"])
    if kind == "missing" and isinstance(location[-1], int):
        return f"{_dotted(location[:-1])} = {_shown(error)}; must have {location[-1] + 1} or more entries"
    if kind == "missing":
        return f"{key} is missing; print a complete file with: advml preset digits"
    if kind == "extra_forbidden":
        return unknown(key, _section(location[:-1], root).model_fields)
    if kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "")
        return unknown(key, choices.split(", ")) if "[key]" in error["loc"] else f"{key} = {_shown(error)}; choose from {choices}"
    if kind == "model_type":
        return f"{key} = {_shown(error)}; must be a section with the keys {', '.join(_section(location, root).model_fields)}"
    allowed = _schema(location, root.model_json_schema(), "propertyNames" if "[key]" in error["loc"] else None)
    context = context | {"range": _range(allowed), "form": allowed.get("form")}
    return f"{key} = {_shown(error)}; {REMEDIES.get(kind, error['msg']).format(**context)}"


def _schema(location: tuple[int | str, ...], root: dict[str, Any], last: str | None) -> dict[str, Any]:
    """JSON schema at an error's location, or of the keys there."""
    current = root
    for part in location[:-1] if last else location:
        current = _resolved(current, root)
        items = current.get("prefixItems") or [current.get("items", {})]
        found = items[min(part, len(items) - 1)] if isinstance(part, int) else current.get("properties", {}).get(part)
        current = found or current.get("additionalProperties") or {}
    current = _resolved(current, root)
    return current.get(last, {}) if last else current


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Resolve references, and reduce alternatives to the one that is not null."""
    schema = schema["anyOf"][0] if "anyOf" in schema else schema
    return root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _range(schema: dict[str, Any]) -> str:
    return " and ".join(words.format(schema[name]) for words, names in BOUNDS.items() for name in names if name in schema)


def _dotted(location: tuple[int | str, ...]) -> str:
    """Dotted key of a location: ('views', 'supervised', 'scale', 1) -> views.supervised.scale[1]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _shown(error: dict[str, Any]) -> str:
    """YAML of the rejected value, shortened, since it may be a whole section."""
    value = error["input"]
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    text = masked(text[:10_000])  # mask passwords before shortening, so that none is cut and thus missed
    return text if len(text) <= 60 else f"{text[:57]}..."


def _section(location: tuple[int | str, ...], root: type[BaseModel]) -> type[BaseModel]:
    """Class of the section at an error's location."""
    return functools.reduce(_below, location, root)
