"""Presets: they load, are the repository's own files, and say what they claim to say; values put into a file that was edited by hand."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from advml import config
from advml.attacks.pgd import evaluation_adversary, training_adversary
from advml.config.presets import PRESETS, QUICK, preset
from advml.config.rewrite import rewrite
from advml.config.writing import editor_schema
from advml.core.errors import UserError

REPOSITORY = Path(__file__).parents[2]
CASES = [(name, protocol) for name, protocols in PRESETS.items() for protocol in protocols] + [(name, "quick") for name in QUICK]
WRITTEN = {
    "params.yaml": ("advml preset digits", lambda: preset("digits")),
    "pipelines/smoke/params.yaml": ("advml preset smoke", lambda: preset("smoke")),
    "pipelines/semi_supervised/params.yaml": ("advml preset semi_supervised", lambda: preset("semi_supervised")),
    "params.schema.json": ("advml schema", editor_schema),
}


def written(name: str, protocol: str = "corrected", *, full: bool = False) -> str:
    """The text of one of CASES."""
    return preset(name, quick=True, full=full) if protocol == "quick" else preset(name, protocol=protocol, full=full)


@cache
def content(name: str, protocol: str = "corrected", full: bool = False) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(written(name, protocol, full=full))


@cache
def load(name: str, protocol: str = "corrected") -> config.Config:
    return config.validate(content(name, protocol))


@pytest.mark.parametrize("file", WRITTEN)
def test_the_files_of_the_repository_are_what_a_command_prints(file: str) -> None:
    command, text = WRITTEN[file]
    assert (REPOSITORY / file).read_text(encoding="utf-8") == text(), f"run: {command} > new && mv new {file}"


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_a_preset_loads_and_means_the_same_with_all_keys_written_out(name: str, protocol: str) -> None:
    assert load(name, protocol).data.name == (name if name in ("cifar10", "cifar100", "folder") else "digits")
    full = content(name, protocol, full=True)
    assert config.validate(full) == load(name, protocol)
    assert config.flatten(full).keys() == config.flatten(load(name, protocol).model_dump(mode="json")).keys()


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_a_preset_is_short_in_the_order_of_the_schema_and_without_anchors(name: str, protocol: str) -> None:
    text = written(name, protocol)
    assert len(text.splitlines()) <= 150 and max(map(len, text.splitlines())) <= 140
    assert list(content(name, protocol)) == [key for key in config.Config.model_fields if key in content(name, protocol)]
    assert not re.search(r"[:\[ ] [&*]\w|<<:", text), "an anchor: DVC would change all its places"
    assert text.count("# yaml-language-server: $schema=") == 1


def test_the_quick_study_trains_the_same_schemes_for_free_and_the_whole_one_is_the_default() -> None:
    quick, whole = load("digits", "quick"), load("digits")
    assert quick.grid.schemes == whole.grid.schemes and (quick.attack.kind, whole.attack.kind) == ("free", "pgd")


@pytest.mark.parametrize(("name", "protocol"), [("cifar10", "corrected"), ("cifar10", "paper"), ("smoke", "corrected")])
def test_a_preset_without_a_quick_study_is_refused(name: str, protocol: str) -> None:
    with pytest.raises(UserError, match=rf"preset = '{name}'.* digits"):
        preset(name, protocol=protocol, quick=True)


def test_every_key_is_explained() -> None:
    text = preset("digits", full=True)
    explained = {line.split(":")[0].strip() for line in text.splitlines() if "# " in line}
    keys = {part for key in config.flatten(load("digits").model_dump(mode="json")) if ".space." not in key for part in key.split(".")}
    names = {*load("digits").pretrain, *load("digits").regimes}
    assert keys - names <= explained


OVERRIDES = [
    ("seeds=[0, 1]", "threat_model.epsilon=4/255"),
    ("views.supervised.pad=4", "views.contrastive.resized_crop=[1/2, 1]"),
    ("model.options.drop_path_rate=0.1", "model.options.stem.kind=deep"),
    ("+regimes.Full-AT.loss=trades", "regimes.ST.epochs=3"),
    ("tune.finetune.space.gradient_clip={float: [0.1, 1]}", "tune.pretrain.space.view.shift.float=[0, 0.2]"),
    ("cluster.slots=2", "cluster.options={a: {b: [1, 2]}}"),
    ("data.path='a b: c # d'", "tracking.uri=http://127.0.0.1:5000"),
    ("evaluate.restarts=1",),
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda pair: pair[0])
def test_an_override_reaches_every_key_written_or_not_and_is_written(overrides: tuple[str, ...], tmp_path: Path) -> None:
    text = preset("digits", overrides=overrides)
    assert config.apply(text, ()) == config.apply(preset("digits"), overrides) != config.apply(preset("digits"), ())
    (tmp_path / "params.yaml").write_text(preset("digits"), encoding="utf-8")
    assert config.validate(config.apply(text, ())) == config.load(tmp_path / "params.yaml", overrides)


def test_a_wrong_override_is_refused() -> None:
    with pytest.raises(UserError, match=r"^-S threat_model\.eps=1"):
        preset("digits", overrides=["threat_model.eps=1"])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_paper_protocol_is_the_column_of_the_paper(name: str) -> None:
    paper = load(name, "paper")
    phases = [*paper.pretrain.values(), *paper.regimes.values()]
    assert {
        (p.epochs, p.batch_size, p.optimizer, p.learning_rate, p.weight_decay, p.schedule, p.warmup, p.label_smoothing, p.keep)
        for p in phases
    } == {(200, 256, "adam", 3e-4, 0.0, "constant", 0.0, 0.0, "last")}
    assert (paper.model.backbone, paper.model.stem, paper.model.normalize_logits, paper.model.batch_norm) == (
        "resnet50",
        "small",
        True,
        "single",
    )
    assert paper.temperature == 0.07
    assert paper.views.supervised == config.View(pad=5, flip=0.5)
    assert paper.views.contrastive == config.View(
        resized_crop=(0.08, 1), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grey=0.2
    )
    threat_model = {"norm": "linf", "epsilon": 8 / 255}
    attack = {"step_size": 0.01, "random_start": False, "keep": "last", "momentum": 0.0, "schedule": "constant"}
    assert asdict(training_adversary(paper.attack, paper.threat_model)) == {
        "threat_model": threat_model,
        "steps": 5,
        "mode": "train",
        **attack,
    }
    measured = evaluation_adversary(paper.evaluate, paper.threat_model, share=0.5)
    assert asdict(measured) == {"threat_model": {**threat_model, "epsilon": 4 / 255}, "steps": 40, "mode": "eval", **attack}
    assert paper.evaluate.restarts == 1


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_no_preset_uses_an_option_that_is_there_to_be_searched(name: str, protocol: str) -> None:
    chosen = {name for name, field in config.Phase.model_fields.items() if field.is_required()} | {"warmup", "keep"}
    assert all(phase.model_fields_set <= chosen for phase in load(name, protocol).phases.values())


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_corrected_protocol_corrects_what_the_table_says(name: str) -> None:
    ours = load(name)
    assert (ours.model.backbone, ours.model.stem, ours.model.normalize_logits) == ("resnet18", "small", False)
    assert ours.threat_model.epsilon == 8 / 255
    for adversary in (training_adversary(ours.attack, ours.threat_model), evaluation_adversary(ours.evaluate, ours.threat_model)):
        assert adversary.random_start
        assert adversary.step_size == pytest.approx(2.5 * 8 / 255 / adversary.steps)
        assert adversary.mode == "eval"
    assert evaluation_adversary(ours.evaluate, ours.threat_model).keep == "best"
    assert ours.views.supervised == config.View(pad=4, flip=0.5)
    assert ours.views.contrastive == config.View(
        resized_crop=(0.2, 1), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grey=0.2
    )
    for phase in [*ours.pretrain.values(), ours.regimes["Full-AT"]]:
        assert (phase.schedule, phase.keep) == ("cosine", "best") and phase.warmup > 0


@pytest.mark.parametrize(
    ("name", "protocol", "line"),
    [
        ("mnist", "corrected", r"preset = 'mnist'.* digits, smoke, semi_supervised, cifar10, cifar100, folder"),
        ("cifar10", "papers", r"protocol = 'papers'.* corrected, paper"),
        ("digits", "paper", r"preset = 'digits' .*'paper'.* cifar10, cifar100"),
    ],
)
def test_an_unknown_preset_is_met_with_the_choices(name: str, protocol: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        preset(name, protocol=protocol)


YAML_TEXT = """\
# head
a:                              # of a
  b: null                       # of b
  c: {d: 1}

e: [1, 2]
"""


def test_rewriting_changes_the_named_lines_only() -> None:
    assert rewrite(YAML_TEXT, {}) == YAML_TEXT
    assert rewrite(YAML_TEXT, {"a.b": "8/255"}) == YAML_TEXT.replace("b: null ", "b: 8/255")
    assert rewrite(YAML_TEXT, {"a.c": {"x": [0.5, 1.0], "y": True}}) == YAML_TEXT.replace("{d: 1}", "{x: [0.5, 1.0], y: true}")
    assert rewrite(YAML_TEXT, {"a.c.x": [0.5, 1.0]}) == YAML_TEXT.replace("{d: 1}", "{d: 1, x: [0.5, 1.0]}")
    long = {f"key{number}": number for number in range(30)}
    inline = ", ".join(f"{key}: {value}" for key, value in long.items())
    assert rewrite(YAML_TEXT, {"a.c": long}) == YAML_TEXT.replace("d: 1", inline)  # still on one line
    assert rewrite(YAML_TEXT, {"e": None}) == YAML_TEXT.replace("[1, 2]", "null")


def test_a_section_rewritten_as_a_whole_keeps_the_empty_line_behind_it() -> None:
    assert rewrite("a:\n  b: 1 # of b\n\nc: 2\n", {"a": {"x": 3}}) == "a:\n  x: 3\n\nc: 2\n"


def test_a_new_key_comes_before_the_comments_that_lead_to_the_next_section() -> None:
    text = "a:\n  b: 1  # of b\n\n  # of all\n\n# of c\nc:\n- 1\n"
    assert rewrite(text, {"a.new": None}) == text.replace("# of b\n", "# of b\n  new: null\n")
    assert rewrite(text, {"d": [1, 2]}) == text + "d: [1, 2]\n"
    assert rewrite("a:\n  b: 1", {"a.c.d": 2}) == "a:\n  b: 1\n  c: {d: 2}\n"
    assert rewrite("a:\n  b: 1\n", {"a.c.d": 2, "a.c.e": 3}) == "a:\n  b: 1\n  c: {d: 2, e: 3}\n"


# The schema for editors


def marked(raw: dict[str, Any]) -> list[str]:
    """What an editor marks."""
    return [error.message for error in Draft202012Validator(json.loads(editor_schema())).iter_errors(json.loads(json.dumps(raw)))]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_an_editor_accepts_every_preset(name: str, protocol: str, full: bool) -> None:
    assert marked(content(name, protocol, full=full)) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("threat_model.eps=1", "'eps' was unexpected"),
        ("grid.schemes=[MAE]", "'MAE' is not one of"),
        ("regimes.Full-AT.epochs=x", "'x' is not"),
        ("regimes.Half-AT={}", "'Half-AT' was unexpected"),
        ("attack.steps=0", "0 is less than"),
        ("threat_model.epsilon=8:255", "'8:255' is not"),
    ],
)
def test_an_editor_marks_a_mistake(override: str, said: str) -> None:
    assert any(said in line for line in marked(config.apply(preset("digits"), [override])))


@pytest.mark.parametrize("override", ["threat_model.epsilon=8 / 255", "pretrain.SL.learning_rate='1e-3'", "corruptions.names=none"])
def test_an_editor_accepts_what_the_configuration_does(override: str) -> None:
    assert marked(config.apply(preset("digits"), [override])) == []
