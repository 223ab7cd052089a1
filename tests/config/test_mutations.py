"""Damaged params.yaml: whatever is in it, it loads, or one line names the key. And every key of the schema has bounds.

A hundred mutations run in the suite. Two thousand: `ADVML_MUTATIONS=2000 python -m pytest tests/config/test_mutations.py`.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from advml import config
from advml.cli import app
from advml.cli.errors import guarded
from advml.config.presets import preset
from advml.core.errors import UserError
from advml.core.messages import LONGEST, one_line

COUNT = int(os.environ.get("ADVML_MUTATIONS", "100"))
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 1.5, 2**31, 2**63, -(2**63), 10**40, 1e-300, 1e300, -1e308, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "maybe",
        "own",
        "nobody",
        "meta",
        "cuda:99999",
        "8/0",
        "1/3",
        "1e400",
        "9" * 5000,
        "2024-05-01",
        "~nosuchuser",
        "../..",
        "*",
    ),
    *("a\0b", "\x1b[31mred\x1b[0m", "two\nlines", "\u202eright to left", "\u2028", "\ud800", "x" * 10_000, "${seeds}", "0; id #", "{{x}}"),
    *([], [[]], [None], [True], ["a", "a"], [1.5, 0.5], [float("nan")], [0] * 2000, list(range(2000))),
    *({}, {"a": 1}, {"": None}, {"a.b": []}, {"x\n\x1b": {"y": [[{}]]}}),
    *({"float": [0, 10**300]}, {"log": [0, 1]}, {"choice": [{}]}, {"int": ["a", "b"]}),
)
TOKENS = (
    *("", "\t", "\0", "\x1b[2J", "[" * 3000, "{", "]", ": ", "- ", "&a ", "*a", "<<: *a\n", "? ", "| ", "\ufeff", "\n---\n", "%YAML 9\n"),
    *("\u2028", "!!bool maybe", "!!python/name:os.system ", '"\\UFFFFFFFF"', "!!timestamp 2001-99-99", "!!int ''"),
)


@cache
def template() -> dict[str, Any]:
    """Every key, also those that the preset does not write."""
    return config.validate(config.apply(preset("digits"), ())).model_dump(mode="json")


def sections(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of everything inside."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from sections(inner, (*path, key))


def mutated(seed: int) -> tuple[str, tuple[str, ...]]:
    """A damaged file's text, and the parts of the key that was damaged; none where it is the text."""
    rng = random.Random(seed)
    kind = rng.choice(("value", "value", "value", "value", "lost", "misspelt", "new", "inside", "text"))
    if kind == "text":
        return damaged(rng), ()
    raw = copy.deepcopy(template())
    *parents, leaf = rng.choice(list(sections(raw)))
    node = raw
    for name in parents:
        node = node[name]
    if kind == "value":
        node[leaf] = rng.choice(HOSTILE)
    elif kind == "inside":
        node[leaf] = {**node[leaf], "b\x1b[0m\n": 1} if isinstance(node[leaf], dict) else [node[leaf], rng.choice(HOSTILE)]
    elif kind == "new":
        leaf = rng.choice(("new", "x" * 1000, "a\nb", "1", "seeds.x"))
        node[leaf] = rng.choice(HOSTILE)
    else:
        value = node.pop(leaf)
        if kind == "misspelt":
            place = rng.randrange(len(leaf))
            leaf = leaf[:place] + rng.choice(("", "x", leaf[place].swapcase() + "_")) + leaf[place + 1 :]
            node[leaf] = value
    text = json.dumps(raw).replace("NaN", ".nan").replace("Infinity", ".inf")  # JSON is YAML, but for these
    return text, (*parents, leaf)


def damaged(rng: random.Random) -> str:
    """The text with some characters, lines or tokens taken away, doubled or put in."""
    text = preset_text()
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text))
        end = min(len(text), start + rng.choice((0, 1, 5, 200)))
        token = rng.choice((*TOKENS, text[start:end] * 2))
        text = text[:start] + token + text[end:]
    return text


@cache
def preset_text() -> str:
    return preset("digits")


def test_a_damaged_file_loads_or_gets_one_line_that_names_the_key(tmp_path: Path) -> None:
    path, loaded, refused = tmp_path / "params.yaml", 0, 0
    for seed in range(COUNT):
        text, key = mutated(seed)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            found = config.load(path)
        except UserError as error:
            refused += 1
            line = one_line(f"advml: {error}")
            assert line.isprintable() and len(line) <= LONGEST, seed
            named = {".".join(key), ".".join(key[:-1]) or key[0]} if key else {"params.yaml"}  # the key, or the section that lacks it
            assert any(one_line(name)[:50] in line for name in named), f"{seed}: {key} is not named: {line}"
            assert "Value error" not in line and "Input should" not in line, f"{seed}: {line}"
        else:
            loaded += 1
            assert config.validate(config.apply(config.dump(found), ())) == found, seed
    assert refused > loaded > 0


@pytest.mark.parametrize("seed", [seed for seed in range(0, COUNT, 25)])
def test_a_command_ends_with_that_line_and_exit_code_2(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params.yaml"
    text = next(text for text, _ in map(mutated, range(seed, seed + 1000)) if is_refused(text, path))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(SystemExit) as left:
        guarded(lambda: app(args=["link", "--params", str(path)], standalone_mode=False))
    line = capsys.readouterr().err
    assert left.value.code == 2
    assert line.startswith("advml: ") and line.count("\n") == 1 and line[:-1].isprintable() and len(line) <= LONGEST + 1


def is_refused(text: str, path: Path) -> bool:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config.load(path)
    except UserError:
        return True
    return False


LOWER, UPPER = {"minimum", "exclusiveMinimum", "ge", "gt"}, {"maximum", "exclusiveMaximum", "le", "lt"}
# By validators of their own.
JUDGED_ELSEWHERE = {"model.options", "cluster.options", "tune.attack.space", "tune.finetune.space", "tune.pretrain.space"}


def unbounded(schema: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[str]:
    """The keys of a JSON schema whose values have no range, form or length."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    for inner in schema.get("anyOf", ()):
        yield from unbounded(inner, root, path)
    kind, keys = schema.get("type"), schema.keys()
    if path in JUDGED_ELSEWHERE or keys & {"enum", "const", "anyOf"} or kind in ("boolean", "null"):
        return
    if kind in ("integer", "number"):
        bounded = keys & LOWER and keys & UPPER
    elif kind == "string":
        bounded = "pattern" in schema
    elif kind == "array":
        bounded = keys & {"maxItems", "maxLength", "max_length"}
        for number, inner in enumerate(
            [*schema.get("prefixItems", ()), *([schema["items"]] if isinstance(schema.get("items"), dict) else ())]
        ):
            yield from unbounded(inner, root, f"{path}[{number}]")
    else:
        bounded = kind == "object" and (schema.get("additionalProperties") is False or "enum" in schema.get("propertyNames", {}))
        for key, inner in schema.get("properties", {}).items():
            yield from unbounded(inner, root, f"{path}.{key}".lstrip("."))
        if isinstance(inner := schema.get("additionalProperties"), dict):
            yield from unbounded(inner, root, f"{path}.*")
    if not bounded:
        yield path


def test_every_key_of_the_schema_has_a_range_a_form_or_a_length() -> None:
    schema = config.Config.model_json_schema()
    assert list(unbounded(schema, schema)) == []


@pytest.mark.parametrize(
    ("override", "key", "allowed"),
    [
        ("runtime.threads=100000", "runtime.threads", "at most 1024"),
        ("runtime.device=meta", "runtime.device", "auto, cpu, cuda"),
        ("pretrain.SL.batch_size=9223372036854775808", "pretrain.SL.batch_size", "at most 1048576"),
        ("data.image_size=9223372036854775808", "data.image_size", "at least 4 and at most 4096"),
        ("temperature=1e300", "temperature", "at least 0.0001 and at most 10000"),
        ("views.contrastive.pad=1000000000", "views.contrastive.pad", "at most 1000"),
        ("tracking.experiment=", "tracking.experiment", "must be text"),
        ("tracking.experiment=''", "tracking.experiment", "not empty"),
        ('tracking.uri="a\\nb"', "tracking.uri", "control characters"),
        ("similarity.source=nobody", "similarity.source", "own, or a model's name"),
        ("similarity.source=CL-AT-s7", "similarity.source", "not a model of the grid; choose from own, SL-ST-s0"),
        ("seeds=['0; id #']", "seeds[0]", "must be a whole number"),
        ("grid={schemes: [SL], standard_regimes: [], adversarial_regimes: []}", "grid.standard_regimes", "name a regime"),
        ("model.options={a: .inf}", "model.options", "finite numbers"),
        ("model.options={a: {b: [1e99]}}", "model.options", "finite numbers"),
        ('model.options={a: "\\e"}', "model.options", "control characters"),
        ("model.options={a-b: 1}", "model.options", "'a-b' is none"),
        ("model.backbone='resnet 18'", "model.backbone", "a name of timm's"),
        ("tune.attack.space.steps={int: [1, 1e300]}", "tune.attack.space.steps", "at most 1e30"),
        ("tune.attack.space={'a b': {int: [1, 2]}}", "tune.attack.space.a b", "a key, e.g. epsilon"),
    ],
)
def test_a_value_that_means_nothing_is_refused_with_what_is_allowed(override: str, key: str, allowed: str) -> None:
    overrides = [override]
    with pytest.raises(UserError) as caught:
        config.validate(config.apply(preset_text(), overrides), overrides=overrides)
    line = str(caught.value)
    assert key in line.replace(override, "") and allowed in line, line


def test_a_misspelt_key_is_not_told_as_the_missing_one() -> None:
    raw = copy.deepcopy(template())
    raw["treat_model"] = raw.pop("threat_model")
    with pytest.raises(UserError, match=r"'treat_model'.*threat_model"):
        config.validate(raw)
    raw = copy.deepcopy(template())
    raw["pretrain"]["SL"]["epoch"] = raw["pretrain"]["SL"].pop("epochs")
    with pytest.raises(UserError, match=r"'pretrain\.SL\.epoch'.*epochs"):
        config.validate(raw)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{key}: &{key} [{','.join([f'*{inner}'] * 9)}]\n" for inner, key in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        *("x: " + "[" * 3000 + "]" * 3000, "- " * 100_000 + "x", "? " * 100_000 + "x", BOMB, "a: &a {b: *a}", "x" * 1_000_001),
        *("seeds: !!bool maybe", 'seeds: "\\UFFFFFFFF"', "1: a\n'1': b", "a: !!timestamp 2001-99-99", "a: !!int ''", "a: " + "9" * 5000),
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_would_break_its_reader_gets_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"params\.yaml (is not valid YAML|has more than)"):
        config.load(tmp_path / "params.yaml")
