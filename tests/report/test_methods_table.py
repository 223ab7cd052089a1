"""How each accuracy was made: a row per figure and per attack of the cascade; what a record lacks is an empty cell."""

from __future__ import annotations

from advml.report.methods_table import COLUMNS, CORRUPTION_HEADERS, HEADERS, cascade, corruptions, not_run, rows, steps

PGD = {
    **{"attack": "pgd", "objective": "cross-entropy", "norm": "linf", "epsilon": 8 / 255, "box": [0, 1], "steps": 20},
    **{"step_size": 0.00392157, "restarts": 3, "random_start": True, "keep": "best", "forward": 123456, "backward": 7000},
}
SQUARE = {
    **{"attack": "square", "norm": "linf", "epsilon": 8 / 255, "box": [0, 1], "steps": 100, "targets": 9, "queries": 5000},
    **{"restarts": 1, "forward": 900, "backward": 0},
}
FIGURES = {
    "accuracy/clean": {"n": 40, "correct": 39, "interval": [0.8711, 0.9956]},
    "accuracy/threat_model_2": {"n": 40, "correct": 20, "interval": [0.352, 0.648], "seed": 7, **PGD},
    "accuracy/worst_case": {
        **{"n": 40, "correct": 17, "interval": [0.284, 0.578], "attack": "cascade", "norm": "linf", "epsilon": 8 / 255, "box": [0, 1]},
        **{"seed": 7, "forward": 1000000, "backward": 7000},
        "cascade": [
            {"name": "threat_model_2", "aimed_at": 39, "broke": 19, **PGD},
            {"name": "apgd-t", "aimed_at": 20, "broke": 2, **SQUARE, "attack": "apgd-t"},
            {"name": "square", "aimed_at": 18, "broke": 1, **SQUARE},
        ],
    },
}


def table() -> dict[str, dict[str, object]]:
    listed = [dict(zip(HEADERS, row, strict=True)) for row in rows(FIGURES)]
    return {row["figure"]: row for row in listed}


def test_a_row_per_figure_and_under_the_worst_case_one_per_attack_of_its_cascade():
    assert list(table()) == [*FIGURES, "— threat_model_2", "— apgd-t", "— square"]
    told = {name: (row["right"], row["of"], row["95 % interval"]) for name, row in table().items()}
    assert told["accuracy/clean"] == (39, 40, "[87.1, 99.6]") and told["accuracy/worst_case"] == (17, 40, "[28.4, 57.8]")
    assert told["— threat_model_2"] == (20, 39, "") and told["— apgd-t"] == (18, 20, "") and told["— square"] == (17, 18, "")


def test_an_attack_that_was_not_run_has_a_row_with_the_reason():
    figure = FIGURES["accuracy/worst_case"] | {"not_run": {"apgd-t": "needs 4 classes"}}
    last = dict(zip(HEADERS, rows({"accuracy/worst_case": figure})[-1], strict=True))
    assert last["figure"] == "— apgd-t" and "needs 4 classes" in last["attack"] and last["right"] == last["forward"] == ""
    assert not_run([{}, {"figures": FIGURES}, {"figures": {"accuracy/worst_case": figure}}]) == {"apgd-t": "needs 4 classes"}


def test_the_columns_tell_everything_of_an_attack():
    row = table()["accuracy/threat_model_2"]
    assert {name: row[name] for name in COLUMNS} == {
        **{"attack": "pgd, cross-entropy", "norm": "linf", "ε": "0.03137", "box": "[0, 1]", "steps": 20, "targets": ""},
        **{"step size": "0.003922", "runs": 3, "start": "random", "iterate": "best", "seed": 7, "forward": "123,456", "backward": "7,000"},
    }
    from_image = rows({"x": FIGURES["accuracy/threat_model_2"] | {"random_start": False}})[0]
    assert dict(zip(HEADERS, from_image, strict=True))["start"] == "image"


def test_what_a_record_lacks_is_an_empty_cell():
    found = table()
    assert {found["accuracy/clean"][name] for name in COLUMNS} == {""}
    worst = found["accuracy/worst_case"]
    assert (worst["attack"], worst["steps"], worst["runs"], worst["step size"], worst["start"]) == ("cascade", "", "", "", "")


def test_a_step_bears_the_seed_of_the_whole_and_only_what_its_attack_has():
    found = table()
    assert {row["seed"] for name, row in found.items() if name.startswith("—")} == {7}
    assert (found["— square"]["steps"], found["— square"]["targets"]) == ("5000 queries", "")
    assert (found["— apgd-t"]["steps"], found["— apgd-t"]["targets"]) == (100, 9)


def test_flags_stand_with_every_attacked_figure_and_with_no_other():
    listed = [dict(zip(HEADERS, row, strict=True)) for row in rows(FIGURES, flags="dead_gradients")]
    assert [row["figure"] for row in listed if row["flags"] == "dead_gradients"] == ["accuracy/threat_model_2", "accuracy/worst_case"]
    assert {row["flags"] for row in listed} == {"", "dead_gradients"}


def test_a_row_per_corruption_says_how_its_figure_was_made():
    about = {"n": 40, "kind": "noise", "severities": [1, 5], "accuracies": [0.9, 0.4], "interval": [0.5, 0.8]}
    computed = about | {"source": "computed", "library": "advml 1.0", "numpy": "2", "scipy": "1", "seed": 3}
    first, second = corruptions({"corruption/fog": computed, "corruption/snow": about | {"source": "CIFAR-10-C"}})
    assert dict(zip(CORRUPTION_HEADERS, first, strict=True)) == {
        **{"figure": "corruption/fog", "n": 40, "accuracy": "65.0", "95 % interval": "[50.0, 80.0]", "at severity": "1: 90.0, 5: 40.0"},
        **{"images": "computed by advml 1.0", "libraries": "numpy 2, scipy 1", "seed": 3},
    }
    assert second[-3:] == ["published, CIFAR-10-C", "", ""]


def test_the_steps_are_the_attacks_beyond_the_threat_models_each_once():
    added = {"accuracy/mi_fgsm": PGD, "accuracy/worst_case": {"cascade": [{"name": "threat_model_2_half"}, {"name": "mi_fgsm"}]}}
    assert steps(added) == ["mi_fgsm"]
    assert steps(FIGURES) == ["apgd-t", "square"] and steps({"accuracy/clean": FIGURES["accuracy/clean"]}) == []
    assert cascade([{"cascade": ["fab-t", "square"]}, {"cascade": ["square", "apgd-t"]}, {"cascade": []}]) == ["fab-t", "square", "apgd-t"]
