"""params.yaml: what it means, what `-S` changes, and the one line that every mistake gets."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from advml import config
from advml.config import schema
from advml.config.presets import preset
from advml.core.errors import UserError
from advml.recipes import SCHEMES

PARAMS = preset("digits")


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS, encoding="utf-8")
    return path


def without(key: str) -> str:
    """The text less the one line that begins like this."""
    lines = PARAMS.splitlines()
    (line,) = (line for line in lines if line.startswith(key))
    lines.remove(line)
    return "\n".join(lines)


def complaint(path: Path, *overrides: str) -> str:
    """The line of the UserError, without the folder's name."""
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(f"{path.parent}/", "")


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("threat_model.epsilon=8/255", "threat_model.epsilon", 8 / 255),
        ("threat_model.epsilon='8 / 255'", "threat_model.epsilon", 8 / 255),
        ("pretrain.SL.learning_rate=1e-3", "pretrain.SL.learning_rate", 1e-3),
        ("pretrain.SL.learning_rate='1e-3'", "pretrain.SL.learning_rate", 1e-3),
        ("regimes.Full-AT.epochs=3", "regimes.Full-AT.epochs", 3),
        ("regimes.Partial-AT.warmup=1/4", "regimes.Partial-AT.warmup", 0.25),
        ("seeds=[0, 1, 2]", "seeds", [0, 1, 2]),
        ("grid.schemes=[CL]", "grid.schemes", ["CL"]),
        ("grid.standard_regimes=[]", "grid.standard_regimes", []),
        ("views.contrastive.resized_crop=[1/5, 1]", "views.contrastive.resized_crop", [0.2, 1.0]),
        ("views.supervised={flip: 0.5}", "views.supervised.flip", 0.5),
        ("attack.step_size=null", "attack.step_size", None),
        ("attack.step_size=", "attack.step_size", None),
        ("attack.random_start=false", "attack.random_start", False),
        ("data.path=my photos/a=b", "data.path", "my photos/a=b"),
        ("data.path=2024-05-01", "data.path", "2024-05-01"),
        ("model.options={layers: [1, 1, 1, 1], drop_path_rate: 0.1}", "model.options.layers", [1, 1, 1, 1]),
        (" data.seed =7", "data.seed", 7),
    ],
)
def test_an_override_changes_its_key_and_no_other(params: Path, override: str, key: str, expected: object) -> None:
    before = config.flatten(config.load(params).model_dump(mode="json"))
    after = config.flatten(config.load(params, [override]).model_dump(mode="json"))
    assert after[key] == expected
    section = override.partition("=")[0].strip()
    assert {k: v for k, v in after.items() if not k.startswith(section)} == {k: v for k, v in before.items() if not k.startswith(section)}


def test_values_of_a_search_change_their_keys_and_no_other(params: Path) -> None:
    before = config.load(params)
    after = config.changed(before, {"regimes.Full-AT.learning_rate": 0.5, "threat_model.epsilon": "8/255"})
    assert after == config.load(params, ["regimes.Full-AT.learning_rate=0.5", "threat_model.epsilon=8/255"]) != before
    assert before == config.load(params)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("regimes.Full-AT.rate", 1, "space: unknown key 'regimes.Full-AT.rate'; choose from epochs, "),
        (
            "regimes.FullAT.epochs",
            1,
            "regimes.FullAT.epochs: unknown key 'regimes.FullAT'; did you mean Full-AT? choose from ST, AT, Partial-AT, Full-AT",
        ),
        ("temperature.x", 1, "temperature.x: 'temperature' is a value, not a section"),
        ("regimes.Full-AT.epochs", 1.5, "space: regimes.Full-AT.epochs = 1.5; must be a whole number"),
    ],
)
def test_a_wrong_value_of_a_search_gets_its_line(params: Path, key: str, value: float, line: str) -> None:
    with pytest.raises(UserError) as caught:
        config.changed(config.load(params), {key: value}, source="space")
    assert str(caught.value).startswith(line)


MISTAKES = {  # override -> what the line says beside the override itself: key and value, and what is allowed or to be done
    # unknown keys
    "threat_model.eps=1": ("'threat_model.eps'", "mean epsilon?", "choose from norm, epsilon"),
    "pretrain.MAE={}": ("'pretrain.MAE'", ", ".join(SCHEMES)),
    "regimes.FullAT.epochs=1": ("'regimes.FullAT'", "mean Full-AT?", "ST, AT, Partial-AT, Full-AT"),
    "seeds.0=3": ("'seeds'", "not a section"),
    # wrong values
    "threat_model.norm=l1": ("threat_model.norm = 'l1'", "linf, l2"),
    "grid.schemes=[SL, SimCLR]": ("grid.schemes[1] = 'SimCLR'", ", ".join(SCHEMES)),
    "grid.schemes=SL": ("grid.schemes = 'SL'", "list"),
    "grid.schemes=[]": ("grid.schemes = []", "1 or more"),
    "grid.schemes=[SL, SL]": ('grid.schemes = ["SL", "SL"]', "twice"),
    "seeds=[0, 0]": ("seeds = [0, 0]", "twice"),
    "seeds=[-1]": ("seeds[0] = -1", "at least 0 and below 2147483648"),
    "threat_model.epsilon=0": ("threat_model.epsilon = 0;", "at least 1e-06 and at most 10000"),
    "threat_model.epsilon=8/0": ("threat_model.epsilon = '8/0'", "a number", "8/255"),
    "threat_model.epsilon=null": ("threat_model.epsilon = null", "a number"),
    "threat_model.epsilon=true": ("threat_model.epsilon = true", "a number"),
    "threat_model.epsilon=.nan": ("threat_model.epsilon = NaN", "finite"),
    "threat_model.epsilon='1e400'": ("threat_model.epsilon = '1e400'", "finite"),
    "pretrain.SL.learning_rate=1e38": ("pretrain.SL.learning_rate = 1e+38", "at least 1e-30 and at most 1e+30"),
    "pretrain.SL.epochs=1.5": ("pretrain.SL.epochs = 1.5", "a whole number"),
    "pretrain.SL.epochs=ten": ("pretrain.SL.epochs = 'ten'", "a whole number"),
    "pretrain.SL.epochs=true": ("pretrain.SL.epochs = true", "a number"),
    "pretrain.SL.label_smoothing=1": ("pretrain.SL.label_smoothing = 1;", "at least 0 and below 1"),
    "views.contrastive.flip=1.1": ("views.contrastive.flip = 1.1", "at least 0 and at most 1"),
    "views.contrastive.scale=[1.2, 0.8]": ("views.contrastive.scale = [1.2, 0.8]", "from low to high"),
    "views.contrastive.scale=[0, 1]": ("views.contrastive.scale[0] = 0;", "at least 0.01 and at most 100"),
    "views.contrastive.scale=[1]": ("views.contrastive.scale = [1]", "2 or more"),
    "views.contrastive.scale=[1, 2, 3]": ("views.contrastive.scale = [1, 2, 3]", "2 or fewer"),
    "attack.random_start=maybe": ("attack.random_start = 'maybe'", "true, false"),
    "data.channels=2": ("data.channels = 2", "1, 3"),
    "data.path=123": ("data.path = 123", "quotes"),
    "threat_model=0.1": ("threat_model = 0.1", "keys norm, epsilon"),
    "pretrain=null": ("pretrain = null", "key: value"),
    f"data.name={'x' * 99}": (f"data.name = '{'x' * 56}...", "digits, cifar10, cifar100, folder"),
    "regimes.Full-AT.loss=mart": ("regimes.Full-AT.loss = 'mart'", "two-term, trades"),
    "corruptions.names=[fog, rain]": ('corruptions.names = ["fog", "rain"]', "all, none, gaussian_noise, shot_noise, "),
    "corruptions.names=some": ("corruptions.names = 'some'", "all, none, gaussian_noise, shot_noise, "),
    "corruptions.names=[[fog]]": ('corruptions.names = [["fog"]]', "all, none, gaussian_noise, "),
    "corruptions.names=[fog, fog]": ('corruptions.names = ["fog", "fog"]', "twice"),
    "corruptions.names=3": ("corruptions.names = 3", "a list"),
    "corruptions.severities=[6]": ("corruptions.severities[0] = 6", "at least 1 and at most 5"),
    # wrong combinations
    "data.validation=0.8": ("data.validation + data.test = 1",),
    "threat_model.epsilon=8": ("threat_model.epsilon = 8 ", "8/255"),
    "pretrain.SL.warmup=0.1": ("pretrain.SL.warmup = 0.1", "onecycle", "pretrain.SL.schedule = cosine"),
    "regimes.Full-AT.epsilon=8": ("regimes.Full-AT.epsilon = 8 ", "8/255"),
    "regimes={}": ("regimes lacks the section ST", "advml preset digits"),
    # no override at all
    "epsilon": ("key=value",),
    "=1": ("key=value",),
    "seeds=\t[0]": ("YAML", "use spaces"),
    "seeds=[0": ("YAML", "expected ',' or ']'"),
    "seeds=*other": ("YAML", "alias 'other'"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_gets_one_line_that_names_key_value_and_choices(params: Path, override: str) -> None:
    line = complaint(params, override)
    told = (
        line.removeprefix(f"-S {override}") if line.startswith(f"-S {override}") else line.removeprefix(f"-S {override.partition('=')[0]}")
    )
    assert told != line and all(words in told for words in MISTAKES[override]), line


def test_a_key_that_an_override_asks_for_and_the_file_lacks_is_named(params: Path) -> None:
    for overrides, key in ((["data.name=folder"], "data.path"), (["data.name=folder", "data.path=photos"], "data.image_size")):
        line = complaint(params, *overrides)
        assert line.startswith(f"params.yaml: {key} is missing: data.name = 'folder'") and f"-S {key}=" in line


def test_the_last_override_of_a_key_is_blamed_and_no_other_override(params: Path) -> None:
    line = complaint(params, "threat_model.norm=l3", "threat_model.norm=l1", "seeds=[1]")
    assert line.startswith("-S threat_model.norm=l1: threat_model.norm = 'l1'")
    params.write_text(PARAMS.replace("norm: linf", "norm: l1", 1), encoding="utf-8")
    assert complaint(params, "threat_model.epsilon=0.1").startswith("params.yaml: threat_model.norm = 'l1'")


def test_an_unknown_section_is_met_with_all_sections(params: Path) -> None:
    for override in ("threat.epsilon=1", "threat={}"):
        line = complaint(params, override)
        assert "'threat'" in line and "threat_model?" in line and ", ".join(config.Config.model_fields) in line


NEUTRAL = {
    "Data": {"path": None, "image_size": None, "channels": None, "layout": "auto", "max_train": None, "max_test": None, "seed": 0}
    | {"skip_corrupt": False, "duplicates": "keep", "white_level": None, "label_budget": 1, "unlabelled": False},
    "Model": {"options": {}, "projection_size": 100, "normalize_logits": False, "batch_norm": "single", "init": None},
    "View": {"rotation": 0, "scale": (1, 1), "shift": 0, "pad": 0, "resized_crop": None, "flip": 0, "brightness": 0, "contrast": 0}
    | {"saturation": 0, "hue": 0, "jitter": 1, "grey": 0},
    "TrainAttack": {"kind": "pgd", "step_size": None, "random_start": True, "batch_norm": "eval"},
    "Phase": {"warmup": 0, "layer_decay": 1, "label_smoothing": 0, "loss": "two-term", "adversarial_weight": 1, "epsilon": None}
    | {"epsilon_warmup": 0, "attack_steps": None, "frozen_statistics": False, "gradient_clip": None, "keep": "best"}
    | {"clean_weight": 1, "weight_annealing": None, "attacked": None, "attack_kind": None, "views": None, "view_annealing": None}
    | {"average": "none", "average_decay": 0.99, "average_start": 0.75, "averaged_crops": 1},
    "EvaluationAttack": {"epsilon": None, "step_size": None, "restarts": 1, "random_start": True, "objective": "ce", "momentum": 0}
    | {"schedule": "constant", "keep": "best", "adversarial_images": None, "seed": 0},
    "Diagnostics": {"minimal": None, "minimal_steps": 100},
    "Corruptions": {"images": None, "folder": None, "seed": 0},
    "Similarity": {"gram": "float32", "measures": ("cka",), "epsilon_studies": None, "source": "own", "probe_images": None},
    "Runtime": {"device": "auto", "threads": 0, "precision": "fp32", "compile": False, "micro_batch": None, "deterministic": True},
}


@pytest.mark.parametrize("section", NEUTRAL)
def test_a_default_never_changes_because_dvc_does_not_see_it(section: str) -> None:
    """Results made under the old one would count as up to date. A new value belongs into the presets, and a new key here."""
    fields = getattr(schema, section).model_fields
    assert {name: field.get_default(call_default_factory=True) for name, field in fields.items() if not field.is_required()} == (
        NEUTRAL[section]
    )


@pytest.mark.parametrize("kind", ["regimes", "pretrain"])
def test_a_phase_is_needed_for_the_models_of_the_grid_and_missed_when_it_is_asked_for(params: Path, kind: str) -> None:
    name, like = {"regimes": ("Partial-AT", "AT"), "pretrain": ("SCL", "CL")}[kind]
    raw = config.apply(PARAMS, ())
    del raw[kind][name]
    with pytest.raises(UserError, match=f"{kind} lacks the section {name}; copy {kind}.{like}$"):
        config.validate(raw)
    grid = {"schemes": ["SL", "CL"], "standard_regimes": ["ST"], "adversarial_regimes": ["AT"]}
    loaded = config.validate(raw | {"grid": grid})
    with pytest.raises(UserError, match=rf"params\.yaml.*{kind} lacks the section {name}; copy {kind}.{like}$"):
        getattr(loaded, kind)[name]


@pytest.mark.parametrize("plus", ["+", "++"])
def test_the_plus_that_dvc_wants_before_unwritten_keys_changes_nothing(params: Path, plus: str) -> None:
    for override in ("regimes.Full-AT.loss=trades", "cluster.slots=2", "temperature=0.5"):
        assert config.load(params, [plus + override]) == config.load(params, [override]) != config.load(params)
    assert complaint(params, f"{plus}threat_model.norm=l1").startswith(f"-S {plus}threat_model.norm=l1: threat_model.norm = 'l1'")


@pytest.mark.parametrize(
    ("written", "names"),
    [("all", get_args(config.CorruptionName)), ("none", ()), ("[]", ()), ("fog", ("fog",)), ("[snow, fog]", ("snow", "fog"))],
)
def test_corruptions_are_all_none_or_a_list(params: Path, written: str, names: tuple[str, ...]) -> None:
    assert config.load(params, [f"corruptions.names={written}"]).corruptions.names == names


def test_trades_from_the_image_itself_is_refused(params: Path) -> None:
    """There the divergence is smallest, and flat: the attack would not move."""
    assert config.load(params, ["regimes.Full-AT.loss=trades"]).regimes["Full-AT"].loss == "trades"
    line = complaint(params, "regimes.Full-AT.loss=trades", "attack.random_start=false")
    assert "regimes.Full-AT.loss = trades needs attack.random_start = true" in line


@pytest.mark.parametrize("key", ["pretrain.SL", "regimes.Partial-AT", "regimes.Full-AT"])
def test_every_attacked_phase_with_cross_entropy_takes_the_options_of_the_attack(params: Path, key: str) -> None:
    values = {"loss": "trades", "adversarial_weight": 6.0, "epsilon": 0.1, "epsilon_warmup": 0.5, "attack_steps": 2}
    values |= {"clean_weight": 0.5, "weight_annealing": None, "attacked": None, "attack_kind": "fast"}
    assert values.keys() == set(config.OF_THE_ATTACK)
    loaded = config.changed(config.load(params), {f"{key}.{name}": value for name, value in values.items()})
    assert {name: getattr(loaded.phases[key], name) for name in values} == values


def test_a_key_that_a_phase_has_no_use_for_is_neutral_or_refused() -> None:
    other = {"layer_decay": 0.5, "label_smoothing": 0.5, "loss": "trades", "adversarial_weight": 0.5, "epsilon": 0.5}
    other |= {"epsilon_warmup": 0.5, "attack_steps": 1, "frozen_statistics": True, "clean_weight": 0, "weight_annealing": 2}
    other |= {"attacked": "views", "attack_kind": "fast", "views": 3, "view_annealing": 2, "averaged_crops": 5}
    raw = config.apply(PARAMS, ())
    loaded = config.validate(raw | {"pretrain": dict.fromkeys(SCHEMES, raw["pretrain"]["SL"])})
    for key, names in config.WITHOUT_EFFECT.items():
        for name, why in names.items():
            assert config.changed(loaded, {f"{key}.{name}": NEUTRAL["Phase"][name]}).phases[key] is not None
            with pytest.raises(UserError, match=f"{key}.{name} = .*{why}"):
                config.changed(loaded, {f"{key}.{name}": other[name]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (without("temperature:"), "temperature is missing"),
        (without("  norm:"), "threat_model.norm is missing"),
        ("", "advml preset digits"),
        ("- seeds", "advml preset digits"),
        ("a: 1\nb: [1,\n\nc: 2", "line 4: expected ',' or ']'"),
        ("a: 1\na: 2", 'line 2: found duplicate key "a"'),
        ("a: &a [*a]", "aliases"),
        ("a: \x01", "#x0001"),
    ],
)
def test_a_broken_file_gets_one_line(params: Path, text: str, words: str) -> None:
    params.write_text(text, encoding="utf-8")
    line = complaint(params)
    assert line.startswith("params.yaml") and words in line


def test_a_missing_file_is_met_with_the_command_that_writes_one(tmp_path: Path) -> None:
    assert "advml init digits" in complaint(tmp_path / "params.yaml")


def test_a_folder_or_a_binary_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    assert complaint(tmp_path / "params.yaml").startswith("params.yaml cannot be read: ")
    (tmp_path / "folder").mkdir()
    assert complaint(tmp_path / "folder").startswith("folder cannot be read: ")


def test_yaml_that_libyaml_refuses_is_read_in_python(params: Path) -> None:
    overrides = ["tracking={uri: http://127.0.0.1:5000, experiment: advml}"]
    assert config.load(params, overrides).tracking.uri == "http://127.0.0.1:5000"


def test_an_override_does_not_leak_through_a_yaml_alias(params: Path) -> None:
    params.write_text(re.sub(r"  AT: .*", "  AT: *head", PARAMS.replace("  ST: {", "  ST: &head {")), encoding="utf-8")
    assert config.load(params).regimes["AT"] == config.load(params).regimes["ST"]
    loaded = config.load(params, ["regimes.AT.epochs=3"])
    assert loaded.regimes["AT"].epochs == 3
    assert loaded.regimes["ST"].epochs == config.load(params).regimes["ST"].epochs != 3


@pytest.mark.parametrize(
    "overrides", [(), ("threat_model.epsilon=8/255", "seeds=[3, 1]", "attack.step_size=1/30", "regimes.AT.warmup=1e-9")]
)
def test_the_printed_configuration_loads_to_the_same(params: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    loaded = config.load(params, overrides)
    (tmp_path / "resolved.yaml").write_text(config.dump(loaded), encoding="utf-8")
    assert config.load(tmp_path / "resolved.yaml") == loaded


# ruamel.yaml itself does not read back a control character such as \x85, nor in braces a text that begins with : or ?.
TEXT = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1, max_size=200).filter(
    lambda text: text[:1] not in (":", "?") and not text.isspace()
)


@settings(max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(text=TEXT, number=st.floats(1e-6, 1), option=st.booleans() | st.integers(-(10**30), 10**30) | st.floats(-1e9, 1e9) | TEXT)
def test_whatever_a_value_looks_like_it_survives_printing(text: str, number: float, option: object) -> None:
    raw = config.apply(PARAMS, ())
    raw["tracking"]["experiment"], raw["threat_model"]["epsilon"], raw["model"]["options"] = text, number, {"option": option}
    loaded = config.validate(raw)
    assert config.validate(config.apply(config.dump(loaded), ())) == loaded


def test_printing_says_null_and_keeps_the_order_of_the_sections(params: Path) -> None:
    printed = config.dump(config.load(params))
    sections = [line.partition(":")[0] for line in printed.splitlines() if line[0] not in " }"]
    assert sections == list(config.Config.model_fields)
    assert "step_size: null" in printed


def test_flatten_joins_keys_with_dots_and_leaves_lists_whole() -> None:
    nested = {"a": {"b": {"Full-AT": 1}, "c": [1, {"d": 2}]}, "e": None, "f": {}}
    assert config.flatten(nested) == {"a.b.Full-AT": 1, "a.c": [1, {"d": 2}], "e": None}


def test_the_digest_is_the_same_on_every_machine_and_blind_to_the_order_of_keys() -> None:
    digest = hashlib.sha256(b'[{"a": 1, "b": [0.5, null]}, "x"]').hexdigest()[:16]
    assert config.digest({"a": 1, "b": [0.5, None]}, "x") == config.digest({"b": [0.5, None], "a": 1}, "x") == digest


def test_the_digest_tells_values_parts_and_their_order_apart(params: Path) -> None:
    loaded, other = config.load(params), config.load(params, ["attack.steps=6"])
    digests = [config.digest(*parts) for parts in ((loaded,), (other,), ("a", "b"), ("b", "a"), (["a", "b"],), (1,), ("1",), (1.5,))]
    assert len(set(digests)) == len(digests)
    assert config.digest(loaded) == config.digest(config.load(params)) == config.digest(loaded.model_dump(mode="json"))
