"""Between params.yaml and `Config`: reading with overrides, checking, changing, printing, and fingerprints."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from advml.config.explain import explain, first, unknown
from advml.config.search import SPACE_KINDS
from advml.config.whole import Config
from advml.errors import UserError
from advml.passwords import remember

LONGEST = 1_000_000  # characters of a params.yaml
MOST_VALUES = 100_000  # in it, and in all that its aliases stand for
DEEPEST = 30  # levels of sections and lists
FREE = ("model.options", "cluster.options")  # sections of any keys
OPTIONAL = {name for name, field in Config.model_fields.items() if not field.is_required()}  # sections that a file may leave out


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
        raise UserError(f"{path} does not exist; write one with: advml preset digits > {path}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a null character
        raise UserError(f"{path} cannot be read: {error}") from None
    if len(text) > LONGEST:
        raise UserError(f"{path} has more than {LONGEST} characters; a configuration has some thousands: advml preset digits > {path}")
    for override in overrides:
        if override.lstrip().startswith("tracking"):
            remember(override)
    raw = apply(text, overrides, source=str(path))
    if isinstance(tracking := raw.get("tracking"), dict):
        remember(str(tracking.get("uri")))
    return validate(raw, source=str(path), overrides=overrides)


def apply(text: str, overrides: list[str] | tuple[str, ...], *, source: str = "params.yaml") -> dict[str, Any]:
    """The mapping in a YAML text, with `key=value` overrides applied; not validated yet."""
    raw = _parse_yaml(text, source=source)
    if not isinstance(raw, dict):
        raise UserError(f"{source} holds no mapping of sections; print a complete one with: advml preset digits")
    for override in overrides:
        _apply(raw, override)
    return raw


def validate(raw: dict[str, Any], *, source: str = "params.yaml", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Turn a plain mapping, to which `overrides` were applied, into a Config, or raise UserError with one line."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        line = explain(first(error.errors()), Config)
        raise UserError(f"{_culprit(line, overrides) or source}: {line}") from None


def _culprit(line: str, overrides: list[str] | tuple[str, ...]) -> str | None:
    """The last override of the key that an explanation begins with."""
    key = line.removeprefix("unknown key '")
    return next((f"-S {one}" for one in reversed(overrides) if re.match(rf"{re.escape(one.partition('=')[0].strip())}\b", key)), None)


def changed(config: Config, values: Mapping[str, Any], *, source: str = "params.yaml") -> Config:
    """The configuration with other values under these dotted keys; checked like a file.

    Raises:
        UserError: one line naming key, value and choices.
    """
    raw = config.model_dump(mode="json")
    for key, value in values.items():
        _put(raw, key, value)
    return validate(raw, source=source)


def dump(config: Config) -> str:
    """The resolved configuration as YAML, in the order of params.yaml."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = None, False, 120
    stream = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; lists stay values."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()}


def digest(*parts: Any) -> str:
    """A short, stable fingerprint of JSON-like values and pydantic models (16 hex digits)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=64)  # a params.yaml takes 15 ms, and whoever needs several configurations reads it several times
def _as_json(text: str) -> str:
    """The YAML text as JSON: there aliases do not share one object, so that an override would reach them all; dates become text."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    _check_depth(text)
    try:
        found = YAML(typ="safe").load(text)  # libyaml, where it is installed: four times as fast
    except YAMLError:  # which does not know {uri: http://...}, and says less of what is wrong
        found = YAML(typ="safe", pure=True).load(text)
    return json.dumps(_plain(found, left=itertools.count(1)))


def _check_depth(text: str) -> None:
    """Refuse what is nested too deeply before it is loaded: libyaml calls itself for every level, and ends the process."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    depth = 0
    try:
        for event in YAML(typ="safe").parse(text):
            name = type(event).__name__
            depth += name.endswith("StartEvent") - name.endswith("EndEvent")
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} levels deep")
    except YAMLError:  # loading says what is wrong; what has been read so far is not deep
        pass


def _plain(value: Any, *, left: Iterator[int], depth: int = 0) -> Any:
    """Dictionaries, lists and plain values; of an alias, a copy.

    Raises:
        ValueError: there are too many of them, or one contains itself: some lines of aliases can stand for more than fits into memory.
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
    except Exception as error:  # of a value that its tag does not allow, ruamel.yaml raises anything: KeyError, OverflowError, ...
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark and "\n" in text else ""
        reason = (getattr(error, "problem", None) or str(error)).partition("\n")[0]
        reason = reason if " " in reason else f"{type(error).__name__} {reason}"
        raise UserError(f"{source} is no valid YAML: {place}{reason}") from None


def parse_override(override: str) -> tuple[str, Any]:
    """`a.b=[1, 2]` -> ("a.b", [1, 2]); the value is read as YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"-S {override} is not of the form key=value, e.g. -S threat_model.epsilon=8/255")
    return key.strip(), _parse_yaml(value, source=f"-S {override}")


def _apply(raw: dict[str, Any], override: str) -> None:
    key, value = parse_override(override)
    _put(raw, key, value, told="-S ")


def _put(raw: dict[str, Any], key: str, value: Any, *, told: str = "") -> None:
    node: Any = raw
    *parents, leaf = parts_of(key)
    for done, name in enumerate(parents, 1):
        path = ".".join(parents[:done])
        if name not in node and path not in OPTIONAL and path not in FREE and not path.startswith(tuple(f"{free}." for free in FREE)):
            raise UserError(f"{told}{key}: {unknown(path, Config.model_fields if node is raw else node)}")
        if not isinstance(node.setdefault(name, {}), dict):
            raise UserError(f"{told}{key}: '{path}' is a value, not a section")
        node = node[name]
    node[leaf] = value


def parts_of(key: str) -> list[str]:
    """`tune.pretrain.space.view.shift` -> tune, pretrain, space, view.shift: the keys of a search's space hold dots themselves.

    The last part of `tune.pretrain.space.view.shift.float` is a kind of range again.
    """
    parts = key.split(".")
    if len(parts) < 5 or parts[0] != "tune" or parts[2] != "space":
        return parts
    kind = parts[-1:] if parts[-1] in SPACE_KINDS else []
    return [*parts[:3], ".".join(parts[3 : len(parts) - len(kind)]), *kind]
