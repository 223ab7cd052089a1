"""Presets: complete, commented files that load, and say what they claim to say."""

from __future__ import annotations

import re
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from advml import config
from advml.attacks.pgd import evaluation_adversary, training_adversary
from advml.errors import UserError
from advml.presets import PRESETS, preset
from advml.rewrite import rewrite

CASES = [(name, protocol) for name, protocols in PRESETS.items() for protocol in protocols]
COMMENT = re.compile(r"^(?P<code>[^#]*\S)(?P<gap> +)(?P<comment># .*)$")


@cache  # reading and writing YAML with its comments takes half a second
def written(name: str, protocol: str = "corrected") -> str:
    return preset(name, protocol=protocol)


@cache
def content(name: str, protocol: str) -> dict:
    return YAML(typ="safe", pure=True).load(written(name, protocol))


@cache
def load(name: str, protocol: str = "corrected") -> config.Config:
    return config.validate(content(name, protocol))


def test_the_digits_preset_is_the_params_file_of_the_repository() -> None:
    root = Path(__file__).parents[1]
    assert preset("digits") == (root / "params.yaml").read_text(encoding="utf-8"), "run: cp params.yaml src/advml/digits.yaml"


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_a_preset_loads_and_is_complete(name: str, protocol: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(written(name, protocol), encoding="utf-8")
    loaded = config.load(tmp_path / "params.yaml")
    assert loaded.data.name == name
    assert loaded.grid.regimes == ("ST", "AT", "Partial-AT", "Full-AT")


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_a_preset_writes_out_every_parameter_because_dvc_sees_no_other(name: str, protocol: str) -> None:
    """Only the parts of a view that are switched off may be left out, and `cluster`, on which no stage depends."""
    found = config.flatten(content(name, protocol))
    known = config.flatten(load(name, protocol).model_dump(mode="json"))
    assert {key for key in known if key not in found and not key.startswith(("views.", "cluster."))} == set()


def test_the_smoke_study_has_the_keys_of_the_study() -> None:
    root = Path(__file__).parents[1]
    ours, smoke = (config.flatten(YAML(typ="safe").load(root / path)) for path in ("params.yaml", "pipelines/smoke/params.yaml"))
    assert smoke.keys() == ours.keys()


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_a_preset_has_no_anchors_because_dvc_would_change_all_their_places(name: str, protocol: str) -> None:
    assert not re.search(r"[:\[ ] [&*]\w|<<:", written(name, protocol))


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_comments_survive_in_one_column_and_sections_keep_their_blank_lines(name: str, protocol: str) -> None:
    text, template = written(name, protocol), written("digits")
    columns = {match.start("comment") for line in text.splitlines() if (match := COMMENT.match(line))}
    assert columns == {32}
    assert len(re.findall("#", text)) >= len(re.findall("#", template))
    assert text.count("\n\n") == template.count("\n\n")
    assert "\n\n\n" not in text
    assert text.endswith("\n")
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_the_sections_come_in_the_order_of_the_template(name: str, protocol: str) -> None:
    assert list(content(name, protocol)) == list(content("digits", "corrected"))


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
    for phase in load(name, protocol).phases.values():
        assert {key: getattr(phase, key) for key in config.NEUTRAL} == config.NEUTRAL


def test_the_paper_protocol_says_where_its_own_epsilon_is_measured() -> None:
    line = "  epsilon: 8/255                # of training; the paper attacks at 4/255, half of it: read accuracy/threat_model_*_half\n"
    assert line in written("cifar10", "paper")


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
        assert phase.schedule == "cosine"
        assert phase.warmup > 0
        assert phase.keep == "best"
    assert ours.runtime.threads == 0


def test_the_folder_preset_numbers_what_to_change_first() -> None:
    numbered = re.findall(r"# (\d)\. ", preset("folder"))
    assert numbered == ["1", "2", "3", "4", "5"]
    data = load("folder").data
    assert (data.path, data.image_size) == ("photos", 64)


def test_tuning_the_digits_study_moves_no_phase_of_another_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {case: load(*case) for case in CASES}
    tuned = re.sub(r"^(    (?:epochs|batch_size|weight_decay): ).*$", r"\g<1>77", preset("digits"), flags=re.M)
    tuned = tuned.replace("gradient_clip: null", "gradient_clip: 0.5").replace("\ntemperature: ", "\ntemperature: 9")
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: tuned)
    for case in CASES:
        changed = config.validate(YAML(typ="safe", pure=True).load(preset(case[0], protocol=case[1])))  # anew, not from the cache
        same = (changed.pretrain, changed.regimes, changed.temperature) == (
            before[case].pretrain,
            before[case].regimes,
            before[case].temperature,
        )
        assert same == (case[0] != "digits")


@pytest.mark.parametrize(
    ("name", "protocol", "line"),
    [
        ("mnist", "corrected", "preset = 'mnist'; choose from digits, cifar10, cifar100, folder"),
        ("cifar10", "papers", "protocol = 'papers'; choose from corrected, paper"),
        ("digits", "paper", "preset = 'digits' has no protocol 'paper'; choose the preset from cifar10, cifar100"),
        ("folder", "paper", "preset = 'folder' has no protocol 'paper'; choose the preset from cifar10, cifar100"),
    ],
)
def test_an_unknown_preset_is_met_with_the_choices(name: str, protocol: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        preset(name, protocol=protocol)
    assert str(caught.value) == line


YAML_TEXT = """\
# head
a:                              # of a
  b: null                       # of b
  c: {d: 1}

e: [1, 2]
"""


def test_rewriting_changes_the_named_lines_only() -> None:
    assert rewrite(YAML_TEXT, {}, {}) == YAML_TEXT
    assert rewrite(YAML_TEXT, {"a.b": "8/255"}, {}) == YAML_TEXT.replace("b: null ", "b: 8/255")
    assert rewrite(YAML_TEXT, {"a.c": {"x": [0.5, 1.0], "y": True}}, {}) == YAML_TEXT.replace("{d: 1}", "{x: [0.5, 1.0], y: true}")
    long = {f"key{number}": number for number in range(30)}
    inline = ", ".join(f"{key}: {value}" for key, value in long.items())
    assert rewrite(YAML_TEXT, {"a.c": long}, {}) == YAML_TEXT.replace("d: 1", inline)  # still on one line
    assert rewrite(YAML_TEXT, {"e": None}, {"a.b": "new"}) == YAML_TEXT.replace("[1, 2]", "null").replace("of b", "new")


ADDED = {  # override -> the one line that it changes or adds
    "views.supervised.pad=4": "  supervised: {rotation: 15, scale: [0.9, 1.1], shift: 0.1, pad: 4}",
    "views.contrastive.resized_crop=[1/2, 1]": "brightness: 0.4, resized_crop: [1/2, 1]}",
    "model.options.drop_path_rate=0.1": "  options: {drop_path_rate: 0.1} # passed on to timm.create_model",
    "model.options.stem.kind=deep": "  options: {stem: {kind: deep}} # passed on to timm.create_model",
    "tune.finetune.space.gradient_clip={float: [0.1, 1]}": "      gradient_clip: {float: [0.1, 1]}",
    "tune.pretrain.space.view.pad={int: [0, 2]}": "      view.pad: {int: [0, 2]}",
    "tune.pretrain.space.view.shift={float: [0, 0.2]}": "      view.shift: {float: [0, 0.2]}",
    "tune.pretrain.space.view.shift.float=[0, 0.2]": "      view.shift: {float: [0, 0.2]}",
}


@pytest.mark.parametrize("override", ADDED)
def test_an_override_reaches_keys_that_the_template_leaves_at_their_defaults(override: str) -> None:
    before, after = written("digits").splitlines(), preset("digits", overrides=[override]).splitlines()
    (line,) = (line for line in after if line not in before)
    assert ADDED[override] in line
    kept = [line for line in before if line in after]
    assert [line for line in after if line in before] == kept and len(kept) >= len(before) - 1
    assert config.apply("\n".join(after), ()) == config.apply(written("digits"), [override])


@pytest.mark.parametrize(
    "pair",
    [
        ("cluster.slots=2", "cluster.cores=4"),
        ("cluster={slots: 2}", "cluster.cores=4"),
        ("cluster.slots=2", "cluster.options={a: {b: [1, 2]}}"),
        ("views.supervised.pad=4", "views.contrastive.pad=2"),
        ("views.supervised.pad=4", "views.supervised.resized_crop=[1/2, 1]"),
        ("model.options.stem.kind=deep", "model.options.stem.width=8"),
    ],
)
def test_two_overrides_of_keys_that_the_template_does_not_write_are_both_there(pair: tuple[str, str]) -> None:
    assert config.apply(preset("digits", overrides=pair), ()) == config.apply(written("digits"), pair)


def test_a_new_key_comes_before_the_comments_that_lead_to_the_next_section() -> None:
    text = "a:\n  b: 1  # of b\n\n  # of all\n\n# of c\nc:\n- 1\n"
    assert rewrite(text, {"a.new": None}, {}) == text.replace("# of b\n", "# of b\n  new: null\n")
    assert rewrite(text, {"d": [1, 2]}, {}) == text + "d: [1, 2]\n"
    assert rewrite("a:\n  b: 1", {"a.c.d": 2}, {}) == "a:\n  b: 1\n  c: {d: 2}\n"


def test_a_remark_of_a_key_that_is_not_there_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError, match="typo"):
        rewrite(YAML_TEXT, {}, {"a.typo": "of nothing"})


def test_overrides_are_written_into_the_text_and_checked():
    text = preset("cifar10", overrides=["seeds=[0, 1]", "threat_model.epsilon=4/255"])
    assert "seeds: [0, 1]                   # one model per" in text and "epsilon: 4/255                # eight" in text
    template = preset("cifar10").splitlines()
    changed = [line for line in text.splitlines() if line not in template]
    assert len(changed) == 2
    with pytest.raises(UserError, match=r"unknown key 'threat_model\.eps'"):
        preset("digits", overrides=["threat_model.eps=1"])


@pytest.mark.parametrize("override", ["data={name: digits, validation: 0.1, test: 0.2}", "runtime={threads: 1}"])
def test_a_section_given_as_a_whole_keeps_the_empty_line_behind_it(override: str) -> None:
    text = preset("digits", overrides=[override])
    assert text.count("\n\n") == written("digits").count("\n\n") and "\n\n\n" not in text
    assert config.apply(text, ()) == config.apply(written("digits"), [override])
