"""Anyone's models stand on the page beside the grid's: the same columns, marks, flags and lines on how figures were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from advml.core.errors import UserError
from advml.evaluation.metrics import wilson
from advml.pipeline.stages import report as stage
from advml.report.table import given_records, given_row


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def record(name: str, data: str, **diagnostics: object) -> dict:
    interval = wilson(20, 40)
    attack = {"attack": "cascade", "norm": "l2", "epsilon": 0.75, "seed": 0, "forward": 1, "backward": 1, "cascade": []}
    figures = {"accuracy/worst_case": {"n": 40, "correct": 20, "interval": interval, **attack}}
    metrics = {"accuracy/worst_case": 0.5, "accuracy/worst_case/low": interval[0], "accuracy/worst_case/high": interval[1]}
    metrics |= {"accuracy/threat_model_2": None}  # could not be measured
    if "evidence" in diagnostics:
        metrics["diagnostics/flags"] = len(diagnostics["flags"])
    return {"model": name, "digest": "b" * 64, "data_digest": data, "metrics": metrics, "figures": figures, "diagnostics": diagnostics}


EVIDENCE = {"epsilon": 0.75, "classes": 4, "largest_class": 0.25, "curve": []}
FLAG = {"name": "dead_gradients", "saw": "zeros everywhere", "try": "BPDA"}


@pytest.fixture
def study(make_study):
    """A study with a model of the grid, and one flagged, one unjudged and one of other data that were given."""
    study = make_study("others", "grid.schemes=[SL]")
    shares = {f"accuracy/{name}{end}": 0.5 for name in ("clean", "worst_case") for end in ("", "/low", "/high")}
    write(study.workspace.report("SL-ST-s0") / "metrics.json", shares | {"diagnostics/flags": 0})
    data = study.context().dataset.digest
    for content in (
        record("bent", data, flags=[FLAG], evidence=EVIDENCE),
        record("stiff", data, flags=[], skipped="no copy of it"),
        record("far", "other", flags=[], evidence=EVIDENCE),
    ):
        write(study.workspace.record("evaluate", content["model"]), content)
    return study


def linked(name: str) -> str:
    """A model's name, leading to its details."""
    return f'<a href="#of-{name}">{name}</a>'


def test_the_page_has_a_section_of_other_models(study):
    stage.run(study.context())
    page = (study.workspace.reports / "report.html").read_text()
    section = page.partition("<h2>Other models</h2>")[2].partition("<h2>")[0]
    bent, stiff = (line for line in section.splitlines() if line.startswith("<tr><td>"))
    figure = f"50.0 [{100 * wilson(20, 40)[0]:.1f}, {100 * wilson(20, 40)[1]:.1f}]"
    for line, name, mark in ((bent, "bent", "!"), (stiff, "stiff", "?")):
        assert line.startswith(f"<tr><td>{linked(name)}</td><td>L2 0.75</td>") and f"<td>{figure} {mark}</td>" in line
    assert "evaluated on other data: far" in section and ">far<" not in page
    doubts = page.partition("<h2>Checks of data and gradient masking</h2>")[2].partition("<h2>")[0]
    assert f"<strong>{linked('bent')}</strong>: zeros everywhere. To try: BPDA." in doubts
    assert f"<strong>{linked('stiff')}</strong> was not probed (no copy of it)" in doubts
    made = page.partition('<h2 id="how">How each number was measured</h2>')[2]
    for name, said in (("bent", "dead_gradients"), ("stiff", "not judged")):
        assert f"<td>{said}</td>" in made.partition(f"<summary>{name} <small>weights bbbbbbbbbbbb</small>")[2].partition("</details>")[0]


def test_a_page_without_other_models_has_no_such_section(study):
    for name in ("bent", "stiff", "far"):
        study.workspace.record("evaluate", name).unlink()
    stage.run(study.context())
    page = (study.workspace.reports / "report.html").read_text()
    assert "Other models" not in page and "measured on other data" not in page


def test_an_evaluation_that_an_older_version_wrote_elsewhere_is_read_until_there_is_a_newer_one(study):
    made = study.workspace.record("evaluate", "bent")
    places = {epsilon: path for epsilon, path in zip((0.5, 0.25), study.workspace.older_evaluations("bent")[::-1], strict=True)}
    for epsilon, older in places.items():
        write(older, json.loads(made.read_text().replace("0.75", str(epsilon))))
    for epsilon, path in ({0.75: made} | places).items():
        assert given_row("bent", given_records(study.workspace)["bent"])["epsilon"] == epsilon
        path.unlink()
    assert "bent" not in given_records(study.workspace)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"model": "bent"}'])
def test_a_damaged_evaluation_is_one_line(study, content):
    study.workspace.record("evaluate", "bent").write_text(content)
    with pytest.raises(UserError, match=r"evaluate/bent.json is damaged") as stopped:
        given_records(study.workspace)
    assert "\n" not in str(stopped.value)
