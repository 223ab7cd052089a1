"""A model's record for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from advml.core.errors import UserError
from advml.core.paths import Workspace
from advml.core.paths import find_model as find
from advml.report.show import record_of

RECORD = {
    "name": "CL-AT-s0",
    "kind": "model",
    "scheme": "CL",
    "regime": "AT",
    "seed": 0,
    "pretraining": {"name": "CL-at-s0", "digest": "b" * 64},
    "git_commit": "c0ffee-dirty",
    "data": {"digest": "d" * 64, "source": "patterns", "counts": {"train": 96, "validation": 32, "test": 40}},
    "classes": ["ash", "birch"],
    "input": [1, 8, 8],
    "parameters": {
        "pretrain": {"CL": {"keep": "last"}},
        "regimes": {"AT": {"epochs": 20, "learning_rate": 0.01, "keep": "best"}},
        "data": {"path": None},
    },
    "architecture": {"backbone": "test_resnet", "options": {}},
    "inputs": "0123",
    "epoch": 17,
    "digest": "a" * 64,
}
ATTACK = {"norm": "linf", "epsilon": 8 / 255, "step_size": 0.00392, "steps": 20, "restarts": 3}
EVALUATION = {
    "digest": "a" * 64,
    "figures": {
        "accuracy/clean": {"n": 40, "correct": 39, "interval": [0.8711, 0.9956]},
        "accuracy/threat_model_2": {"n": 40, "correct": 20, "interval": [0.352, 0.648], **ATTACK},
    },
}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture
def model(workspace) -> Path:
    write(workspace.model("CL-AT-s0") / "model.json", RECORD)
    return workspace.model("CL-AT-s0")


def results(workspace: Workspace, model: str = "CL-AT-s0") -> list[str]:
    """The lines on what was measured, which come between the model's name and what it was made from."""
    return record_of(workspace, model).partition("\n\n")[2].partition("\n\nmade from")[0].splitlines()


def test_the_record_names_origin_architecture_and_parameters(workspace, model):
    shown = record_of(workspace, "CL-AT-s0")
    assert shown.splitlines()[0] == f"CL-AT-s0   ({model})"
    told = " | ".join(" ".join(line.split()) for line in shown.splitlines())
    for part in (
        "data patterns, 96 train, 32 validation, 40 test",
        "data digest dddddddddddddddd |",
        "git commit c0ffee-dirty",
        "weights aaaaaaaaaaaaaaaa |",
        "pretraining CL-at-s0 (bbbbbbbbbbbbbbbb)",
        "selected epoch 17 (the best on validation)",
        "backbone test_resnet",
        "regimes.AT.epochs 20",
        "regimes.AT.learning_rate 0.01",
        "accuracy: not measured yet",
    ):
        assert part in told


def test_parameters_at_their_defaults_are_shown_on_request(workspace, model):
    record = {**RECORD, "parameters": {**RECORD["parameters"], "model": {"options": {"zero_init_last": False}, "stem": "small"}}}
    record["parameters"]["views"] = {"contrastive": {"scale": [1.0, 1.0], "shift": 0.1}}
    write(model / "model.json", record)
    keys = []
    for full in (False, True):
        lines = record_of(workspace, "CL-AT-s0", full=full).splitlines()
        keys.append({line.split()[0] for line in lines[next(n for n, line in enumerate(lines) if line.startswith("parameters")) + 1 :]})
    defaults = {"data.path", "regimes.AT.keep", "views.contrastive.scale"}
    assert keys[1] - keys[0] == defaults and keys[0] >= {"regimes.AT.epochs", "model.options.zero_init_last", "views.contrastive.shift"}


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, "20 steps, worst of 3 runs"),
        ({"restarts": 1}, "20 steps, one run"),
        ({"seed": 7, "forward": 2480, "backward": 2400}, "worst of 3 runs, seed 7, 62 forward and 60 backward passes an image"),
    ],
    ids=["plain", "one run", "seed and passes"],
)
def test_accuracies_come_with_intervals_and_the_attack_that_measured_them(workspace, model, changes, end):
    figures = EVALUATION["figures"] | {"accuracy/threat_model_2": EVALUATION["figures"]["accuracy/threat_model_2"] | changes}
    write(workspace.record("evaluate", "CL-AT-s0"), EVALUATION | {"figures": figures})
    clean, attacked = (" ".join(line.split()) for line in results(workspace)[-2:])
    assert clean == "clean 97.5 % [87.1, 99.6] of 40"
    assert attacked.startswith("threat_model_2 50.0 % [35.2, 64.8] of 40 linf epsilon 0.03137, step_size 0.00392, ") and attacked.endswith(
        end
    )


@pytest.mark.parametrize(
    ("forward", "backward", "told"),
    [(16, 12, ["0.4 forward", "0.3 backward", "not attacked"]), (0, 0, ["no image was left to attack"])],
    ids=["few images", "no image"],
)
def test_an_attack_on_few_images_does_not_read_as_none(workspace, model, forward, backward, told):
    figure = EVALUATION["figures"]["accuracy/threat_model_2"] | {"seed": 7, "forward": forward, "backward": backward}
    write(workspace.record("evaluate", "CL-AT-s0"), EVALUATION | {"figures": {"accuracy/threat_model_2_half": figure}})
    line = results(workspace)[-1]
    assert all(words in line for words in told) and " 0 forward" not in line


def test_corruptions_follow_their_mean_the_worst_first(workspace, model):
    metrics = {"corruption/fog": 0.5, "corruption/snow": 0.25, "corruption/mean": 0.375}
    metrics |= {f"{name}/{end}": value + step for name, value in metrics.items() for end, step in (("low", -0.1), ("high", 0.1))}
    found = {key: {"n": 40, "severities": [1, 3]} for key in ("corruption/fog", "corruption/snow")}
    write(workspace.record("evaluate", "CL-AT-s0"), EVALUATION | {"corruptions": found, "metrics": metrics})
    write(workspace.report("transfer") / "transfer.json", {"rule": "a rule", "seeds": [transfer("CL-AT-s0")]})
    flag, _, title, *lines = results(workspace)[-6:]
    assert "transfer_stronger" in flag
    assert title == "accuracy under corruptions (means over severities 1, 3; 95 % intervals)"
    assert [" ".join(line.split()) for line in lines] == ["mean 37.5 % [27.5, 47.5]", "snow 25.0 % [15.0, 35.0]", "fog 50.0 % [40.0, 60.0]"]


def test_an_attack_that_was_not_run_is_named_with_the_reason(workspace, model):
    step = {"name": "square", "broke": 1, "aimed_at": 20}
    figure = EVALUATION["figures"]["accuracy/threat_model_2"] | {"cascade": [step], "not_run": {"apgd-t": "needs 4 classes"}}
    write(workspace.record("evaluate", "CL-AT-s0"), EVALUATION | {"figures": {"accuracy/worst_case": figure}})
    ran, not_run = results(workspace)[-2:]
    assert ran.split() == ["square", "broke", "1", "of", "20"] and not_run.split() == ["apgd-t", "not", "run:", "needs", "4", "classes"]


def test_accuracies_of_other_weights_are_not_shown(workspace, model):
    write(workspace.record("evaluate", "CL-AT-s0"), {**EVALUATION, "digest": "e" * 64})
    shown = record_of(workspace, "CL-AT-s0")
    assert "belongs to other weights; measure again with: advml evaluate CL AT --seed 0" in shown and "97.5" not in shown


def transfer(*flags: str, models: tuple[str, ...] = ("SL-ST-s0", "CL-AT-s0"), digest: str = "a" * 64) -> dict:
    flagged = [{"model": name, "name": "transfer_stronger", "saw": f"saw {name}", "try": "more steps"} for name in flags]
    return {"models": list(models), "digests": dict.fromkeys(models, digest), "flags": flagged}


def test_flags_of_a_transfer_stand_with_the_model_that_they_name(workspace, model):
    write(workspace.record("evaluate", "CL-AT-s0"), EVALUATION)
    blocks = [transfer("SL-ST-s0", "CL-AT-s0"), transfer("SL-ST-s1", models=("SL-ST-s1",))]
    write(workspace.report("transfer") / "transfer.json", {"rule": "a rule", "seeds": blocks})
    lines = [line for line in record_of(workspace, "CL-AT-s0").splitlines() if "!" in line]
    assert lines == ["  ! transfer_stronger: saw CL-AT-s0; to try: more steps"]


def test_without_flags_of_a_transfer_there_is_no_line(workspace, model):
    write(workspace.record("evaluate", "CL-AT-s0"), EVALUATION)
    plain = record_of(workspace, "CL-AT-s0")
    write(workspace.report("transfer") / "transfer.json", {"rule": "a rule", "seeds": [transfer("SL-ST-s0")]})
    assert record_of(workspace, "CL-AT-s0") == plain


def test_flags_of_a_transfer_of_other_weights_are_not_shown(workspace, model):
    write(workspace.record("evaluate", "CL-AT-s0"), EVALUATION)
    write(workspace.report("transfer") / "transfer.json", {"rule": "a rule", "seeds": [transfer("CL-AT-s0", digest="e" * 64)]})
    assert "transfer_stronger" not in record_of(workspace, "CL-AT-s0")


GIVEN = {
    **{"model": "mine", "digest": "b" * 64, "origin": {"function": "my.models:net"}, "data_digest": "d" * 64, "trained_on": None},
    "diagnostics": {"flags": [{"name": "dead_gradients", "saw": "zeros", "try": "BPDA"}], "evidence": {}},
    "figures": EVALUATION["figures"],
}


def test_anyones_model_is_shown_by_the_name_that_evaluate_gave_it(workspace, model):
    write(workspace.record("evaluate", "mine"), GIVEN)
    told = " | ".join(" ".join(line.split()) for line in record_of(workspace, "mine").splitlines())
    assert told.startswith(f"mine ({workspace.record('evaluate', 'mine')}) | ")
    for part in (
        "function my.models:net",
        "weights bbbbbbbbbbbbbbbb",
        "trained on unknown",
        "threat_model_2 50.0 % [35.2, 64.8] of 40 linf",
    ):
        assert part in told
    assert told.endswith("! dead_gradients: zeros; to try: BPDA")


def test_a_folder_will_do_and_a_trailing_slash_too(workspace, model):
    assert find(workspace, str(model)) == find(workspace, f"{model}/") == find(workspace, "CL-AT-s0") == model
    assert record_of(workspace, str(model)) == record_of(workspace, "CL-AT-s0")


def test_a_pretrained_encoder_has_no_accuracy_and_no_regime(workspace):
    record = {key: value for key, value in RECORD.items() if key not in ("regime", "pretraining")}
    write(workspace.pretrained("CL-at-s0") / "model.json", {**record, "name": "CL-at-s0", "kind": "pretrain", "phase": "at"})
    shown = record_of(workspace, "CL-at-s0")
    assert "selected epoch  17 (the last)" in shown
    assert shown.startswith("CL-at-s0 ") and "accuracy" not in shown and "bbbb" not in shown


def test_a_network_that_was_taken_as_it_is_has_no_selected_epoch(workspace):
    write(workspace.model("SL-ST-s0") / "model.json", {**RECORD, "name": "SL-ST-s0", "epoch": None})
    assert "selected epoch" not in record_of(workspace, "SL-ST-s0")


def test_an_unknown_model_is_answered_with_those_that_exist(workspace, model):
    write(workspace.model("SL-ST-s0") / "model.json", RECORD)
    write(workspace.models / ".SL-AT-s0.part" / "model.json", RECORD)  # left by a process that was killed
    with pytest.raises(UserError) as stopped:
        record_of(workspace, "CL-FAT-s0")
    assert "'CL-FAT-s0'" in str(stopped.value) and str(stopped.value).endswith("choose from CL-AT-s0, SL-ST-s0")


def test_without_any_model_the_answer_is_how_to_train_one(workspace):
    with pytest.raises(UserError, match=r"'x'.*advml train CL Full-AT"):
        record_of(workspace, "x")


REPRESENTED = {"digest": "a" * 64, "how": {"intervals": {"cka": "none: 3 batches of test images, and an interval needs 5"}}}


@pytest.mark.parametrize("gap", [{}, {"cka/redundancy/low": None, "cka/redundancy/high": None}])
def test_an_interval_that_is_not_finite_is_a_dash_with_its_reason(workspace, model, gap):
    """Null in the record, or absent in one of an older version."""
    probe = {"probe/clean": 0.9, "probe/clean/low": 0.8, "probe/clean/high": 0.95}
    write(workspace.record("represent", "CL-AT-s0"), REPRESENTED | {"metrics": {"cka/redundancy": 0.75, **gap, **probe}})
    scalar, read, reason = results(workspace)[-3:]
    assert scalar.split() == ["cka/redundancy", "0.750", "[-,", "-]"] and read.split() == ["probe/clean", "0.900", "[0.800,", "0.950]"]
    assert "none: 3 batches" in reason


def test_a_scalar_that_is_not_finite_is_a_dash_and_the_constant_layers_are_named(workspace, model):
    metrics = {"cka/redundancy": None, "cka/redundancy/low": None, "cka/redundancy/high": None}
    how = {"intervals": {"cka": "95 %"}, "dead_layers": {"clean": ["conv1"], "adversarial": []}}
    write(workspace.record("represent", "CL-AT-s0"), REPRESENTED | {"how": how, "metrics": metrics})
    scalar, reason = results(workspace)[-2:]
    assert scalar.split() == ["cka/redundancy", "-", "[-,", "-]"] and "conv1" in reason


def test_where_all_is_finite_no_reason_is_given(workspace, model):
    probe = {"probe/clean": 0.9, "probe/clean/low": 0.8, "probe/clean/high": 0.95}
    write(workspace.record("represent", "CL-AT-s0"), REPRESENTED | {"metrics": probe})
    assert "not finite" not in record_of(workspace, "CL-AT-s0")


DAMAGED = {  # a file of the model -> what it may contain: nothing, another type, too little
    "model": (lambda space: space.model("CL-AT-s0") / "model.json", ("", "{", "[]", '{"name": "CL-AT-s0"}', "\x00")),
    "evaluation": (lambda space: space.record("evaluate", "CL-AT-s0"), ("", "{}", '{"digest": "' + "a" * 64 + '"}')),
    "evaluation of a given model": (lambda space: space.record("evaluate", "mine"), ("", "{}", "[]")),
    "transfer": (lambda space: space.report("transfer") / "transfer.json", ("", "{}", '{"seeds": [{}]}')),
}


@pytest.mark.parametrize(("kind", "content"), [(kind, content) for kind, (_, contents) in DAMAGED.items() for content in contents])
def test_a_damaged_file_is_one_line_that_names_it(workspace, model, kind, content):
    if kind == "transfer":
        write(workspace.record("evaluate", "CL-AT-s0"), EVALUATION)
    write(path := DAMAGED[kind][0](workspace), content)
    with pytest.raises(UserError) as stopped:
        record_of(workspace, "mine" if "given" in kind else "CL-AT-s0")
    assert path.name in str(stopped.value) and "\n" not in str(stopped.value)
