"""The result table: complete, in the grid's order, and the same bytes for the same figures."""

from __future__ import annotations

import base64
import csv
import io
import json
import re

import pytest
from PIL import Image

from advml.core import paths
from advml.core.errors import UserError
from advml.core.io import to_csv
from advml.evaluation import records
from advml.evaluation.metrics import wilson
from advml.pipeline.stages import report as stage
from advml.report import page
from advml.report.table import COLUMNS, cell, footnote, grid_rows, to_markdown, with_means

NAMES = ("clean", "threat_model_1", "threat_model_2", "threat_model_1_half", "threat_model_2_half", "worst_case")


def measure(study, name: str, **right: int) -> dict[str, float]:
    """Write metrics.json of a model: how many of 40 images are right, under the metrics' short names."""
    metrics = {}
    for key, count in right.items():
        low, high = wilson(count, 40)
        metrics |= {f"accuracy/{key}": count / 40, f"accuracy/{key}/low": low, f"accuracy/{key}/high": high}
    metrics |= {"diagnostics/flags": 0}
    path = study.workspace.report(name) / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics))
    return metrics


def rows_of(study, *overrides: str) -> list[dict]:
    config = study.config(*overrides)
    return grid_rows(config.grid, config.seeds, study.workspace)


@pytest.fixture
def measured(make_study):
    """Three of the grid's models, and one that is not in it."""
    study = make_study("measured", "grid.schemes=[CL, SL]", "seeds=[3, 0]")
    measure(study, "CL-Full-AT-s0", **dict(zip(NAMES, (39, 20, 18, 30, 29, 17), strict=True)))
    measure(study, "SL-ST-s3", clean=40, threat_model_2=0, threat_model_2_half=1, worst_case=0)
    measure(study, "CL-ST-s3", **dict(zip(NAMES, (38, 1, 0, 10, 9, 0), strict=True)))
    measure(study, "SCL-ST-s0", clean=40)
    return study


def test_rows_follow_the_grid_and_leave_out_what_is_not_measured(measured):
    rows = rows_of(measured)
    assert [row["model"] for row in rows] == ["CL-ST-s3", "SL-ST-s3", "CL-Full-AT-s0"]
    assert (rows[2]["scheme"], rows[2]["regime"], rows[2]["seed"], rows[2]["accuracy/clean"]) == ("CL", "Full-AT", 0, 39 / 40)


def test_rows_of_models_at_chance_say_so(measured):
    flagged = {"model": "SL-ST-s3", "digest": "a", "metrics": {}, "diagnostics": {"flags": [{"name": records.AT_CHANCE}]}}
    path = measured.workspace.record("evaluate", "SL-ST-s3")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(flagged))
    assert [row["model"] for row in rows_of(measured) if row.get(records.AT_CHANCE)] == ["SL-ST-s3"]


def test_a_regime_outside_of_the_grid_has_no_row(measured):
    rows = rows_of(measured, "grid.adversarial_regimes=[AT]", "seeds=[0, 3]")
    assert [row["model"] for row in rows] == ["CL-ST-s3", "SL-ST-s3"]


def test_the_csv_reads_back_and_leaves_absent_figures_empty(measured):
    rows = rows_of(measured)
    read = list(csv.DictReader(io.StringIO(to_csv(rows).decode())))
    assert [row["model"] for row in read] == [row["model"] for row in rows]
    supervised = read[1]
    assert supervised["accuracy/threat_model_1"] == supervised["accuracy/threat_model_1/low"] == ""
    for row, back in zip(rows, read, strict=True):
        assert {key: value for key, value in row.items() if key.startswith("accuracy/")} == {
            key: float(value) for key, value in back.items() if key.startswith("accuracy/") and value
        }


def test_a_cell_is_a_percentage_with_its_interval_or_a_dash():
    row = {"accuracy/clean": 0.975, "accuracy/clean/low": 0.9533, "accuracy/clean/high": 0.98749}
    assert cell(row, "accuracy/clean") == "97.5 [95.3, 98.7]"
    assert cell(row, "accuracy/threat_model_1") == "-"


def test_the_markdown_table_has_a_line_per_model_and_a_column_per_figure(measured):
    header, rule, *lines = to_markdown(rows_of(measured)).splitlines()
    assert header == "| model | clean | I, half epsilon | I | II, half epsilon | II | worst case | corrupted | gradient steps | seconds |"
    assert rule.count("|") == header.count("|") == 11
    assert lines[1] == "| SL-ST-s3 | 100.0 [91.2, 100.0] | - | - | 2.5 [0.4, 12.9] | 0.0 [0.0, 8.8] | 0.0 [0.0, 8.8] | - | - | - |"
    assert lines[2].startswith("| CL-Full-AT-s0 | 97.5 [") and "| 75.0 [" in lines[2]


def test_columns_are_metrics_of_the_contract():
    assert set(COLUMNS.values()) == {*(f"accuracy/{name}" for name in NAMES), "corruption/mean", "cost/gradient_steps", "cost/seconds"}


# Flags


def shares(**more: int) -> dict:
    metrics = ("accuracy/clean", "accuracy/threat_model_2", "accuracy/worst_case", "corruption/mean")
    return {"model": "X"} | {f"{name}{end}": 0.5 for name in metrics for end in ("", "/low", "/high")} | more


@pytest.mark.parametrize(
    ("flags", "mark", "note"),
    [
        ({"diagnostics/flags": 0}, "", ""),
        ({"diagnostics/flags": 1}, " !", "! diagnostics raised flags: see advml show X"),
        ({"transfer/flags": 2}, " !", "! diagnostics raised flags: see advml show X"),
        ({"diagnostics/flags": 0, "transfer/flags": 1}, " !", "! diagnostics raised flags: see advml show X"),
        ({}, " ?", "? not judged by diagnostics: see advml show X"),
    ],
)
def test_doubts_mark_attacked_figures_alone_and_the_footnote_says_where_to_look(flags, mark, note):
    row = shares() | flags
    assert cell(row, "accuracy/threat_model_2") == cell(row, "accuracy/worst_case") == f"50.0 [50.0, 50.0]{mark}"
    assert cell(row, "accuracy/clean") == cell(row, "corruption/mean") == "50.0 [50.0, 50.0]"
    assert cell(row, "accuracy/threat_model_1") == "-"
    calm = shares() | {"model": "A", "diagnostics/flags": 0}
    assert footnote([calm, row]) == note
    last = to_markdown([calm, row]).splitlines()[-1]
    assert last == note if note else last.startswith("| X |")


def test_the_footnote_names_the_first_model_of_each_mark_in_a_line_of_its_own():
    rows = [shares() | {"model": name, "diagnostics/flags": count} for name, count in (("A", 0), ("B", 2), ("C", 1))]
    rows += [shares() | {"model": name} for name in ("D", "E")]
    flagged, unjudged = footnote(rows).splitlines()
    assert flagged.endswith("advml show B") and unjudged.endswith("advml show D") and footnote([]) == ""
    assert to_markdown(rows).endswith(f"\n\n{flagged}\n\n{unjudged}\n")


def test_flags_of_a_transfer_are_counted_for_the_models_that_they_name(measured, monkeypatch):
    flags = [{"model": name} for name in ("SL-ST-s3", "CL-ST-s3", "SL-ST-s3", "SCL-ST-s0")]
    monkeypatch.setattr(records, "read_transfer", lambda workspace: {"seeds": [{"flags": flags[:2]}, {"flags": flags[2:]}]})
    rows = {row["model"]: row for row in rows_of(measured)}
    assert {name: row.get("transfer/flags") for name, row in rows.items()} == {"CL-ST-s3": 1, "SL-ST-s3": 2, "CL-Full-AT-s0": None}


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_damaged_metrics_are_one_line(measured, content):
    (measured.workspace.report("SL-ST-s3") / "metrics.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"SL-ST-s3/metrics.json .*dvc repro") as stopped:
        rows_of(measured)
    assert "\n" not in str(stopped.value)


# The stage


def test_the_report_is_written_twice_with_the_same_bytes(measured):
    def written() -> dict[str, bytes]:
        table = stage.run(measured.context())
        assert [row["model"] for row in table] == ["CL-ST-s3", "SL-ST-s3", "CL-Full-AT-s0"]
        return {path.name: path.read_bytes() for path in measured.workspace.reports.glob("summary.*")}

    first = written()
    assert set(first) == {"summary.csv", "summary.md", "summary.png"} and first == written()
    with Image.open(measured.workspace.reports / "summary.png") as picture:
        assert picture.width > 500
    rows = rows_of(measured)
    assert first["summary.csv"] == to_csv(rows) and first["summary.md"].decode() == to_markdown(rows)


def test_what_dvc_shows_is_a_slim_table_and_the_curves_of_all_phases(measured):
    for name, loss in {"CL-at-s0": 2.0, "CL-Full-AT-s0": 1.0, "SCL-at-s0": 9.0}.items():
        measured.workspace.report(name).mkdir(parents=True, exist_ok=True)
        (measured.workspace.report(name) / "history.json").write_text(json.dumps([{"epoch": 1, "train/loss": loss}]))
    stage.run(measured.context())
    results = json.loads((measured.workspace.reports / "results.json").read_text())
    assert set(results) == {"worst_case", "threat_model_2", "clean"}
    assert results["worst_case"] == {"CL-ST-s3": 0.0, "SL-ST-s3": 0.0, "CL-Full-AT-s0": 17 / 40}
    with open(measured.workspace.reports / "training.csv", encoding="utf-8") as file:
        curves = [(row["model"], row["phase"], float(row["train/loss"])) for row in csv.DictReader(file)]
    assert curves == [("CL-Full-AT-s0", "2 fine-tuning", 1.0), ("CL-at-s0", "1 pretraining", 2.0)]


@pytest.mark.parametrize(("tested", "told"), [(True, "Not tested as a whole: Y is missing"), (False, "Not tested: Y is missing")])
def test_a_claim_that_is_not_tested_says_what_is_missing_also_if_some_parts_are(measured, monkeypatch, tested, told):
    about = {"side": "above", "bound": 0.0, "claimed": "above 0", "paper": None}
    parts = [about | {"name": "b", "verdict": "not tested", "seeds": 0, "missing": "Y is missing"}]
    parts += [about | {"name": "a", "verdict": "supported", "seeds": 2, "effect": 0.1, "low": 0.05, "high": 0.2}] if tested else []
    claim = {"key": "k", "claim": "C.", "verdict": "not tested", "seeds": 0, "parts": parts}
    render = page.render
    monkeypatch.setattr(page, "render", lambda *given, **more: render(*given[:3], given[3] | {"claims": [claim]}, **more))
    stage.run(measured.context())
    shown = (measured.workspace.reports / "report.html").read_text()
    assert told in shown and ('<td class="text">a</td>' in shown) == tested


def test_the_page_opens_with_the_finding_and_links_models_to_their_details(measured):
    stage.run(measured.context())
    page = (measured.workspace.reports / "report.html").read_text()
    found = json.loads((measured.workspace.reports / "claims.json").read_text())["finding"]
    assert found and 0 < page.index(found[0]) < page.index("<img") < page.index("<h2>Questions")
    assert page.count("<figure") == page.count("<figcaption><strong>") and "prefers-color-scheme: dark" in page
    drawn, wide = re.search('<img src="data:image/png;base64,([^"]+)" style="--width: ([0-9]+)px"', page).groups()
    with Image.open(io.BytesIO(base64.b64decode(drawn))) as picture:
        assert int(wide) == round(130 * picture.width / picture.info["dpi"][0]) < picture.width


def test_the_report_is_logged_as_a_run_with_its_table_and_files(measured):
    stage.run(measured.context())
    assert [(name.partition(" ")[0], status) for name, status in measured.runs()] == [("study", "FINISHED")]
    store = measured.store()
    (run,) = store.client.search_runs([store.experiment])
    names = {artifact.path for artifact in store.client.list_artifacts(run.info.run_id)}
    assert names == {*paths.REPORT_FILES, "config", "summary.json", "claims_table.json"} and run.data.params["epsilon"] == "0.15"
    assert "Without adversarial training" in run.data.tags["mlflow.note.content"]


def test_a_report_of_nothing_says_how_to_measure(make_study):
    with pytest.raises(UserError, match=r"metrics\.json .*dvc repro"):
        stage.run(make_study().context())


# Several seeds


def test_means_over_seeds_come_first_with_spread_and_intervals_over_trainings_and_images(make_study):
    study = make_study("seeds", "grid.schemes=[SL]", "seeds=[0, 1, 2]")
    for seed, right in enumerate((30, 34, 38)):
        measure(study, f"SL-AT-s{seed}", clean=40, worst_case=right)
    measure(study, "SL-ST-s0", clean=40)
    table = rows_of(study)
    mean, *rows = with_means(table)
    assert rows == table and mean["model"] == "SL-AT, mean of 3 seeds"
    assert mean["accuracy/worst_case"] == pytest.approx(34 / 40) and mean["accuracy/worst_case/sd"] == pytest.approx(0.1)
    between = 4.302653 * 0.1 / 3**0.5  # t with two degrees of freedom
    for end, sign in (("low", -1), ("high", 1)):
        shared = sum(abs(row[f"accuracy/worst_case/{end}"] - row["accuracy/worst_case"]) for row in table if row["regime"] == "AT") / 3
        assert mean[f"accuracy/worst_case/{end}"] == pytest.approx(min(1, 34 / 40 + sign * (between**2 + shared**2) ** 0.5), abs=1e-6)
    assert cell(mean, "accuracy/worst_case").startswith("85.0 ± 10.0 [") and cell(mean, "accuracy/threat_model_1") == "-"
    assert to_markdown(table).splitlines()[2].startswith("| SL-AT, mean of 3 seeds |")


def test_equal_seeds_leave_the_interval_of_one(make_study):
    study = make_study("equal", "grid.schemes=[SL]", "seeds=[0, 1]")
    for seed in (0, 1):
        measure(study, f"SL-AT-s{seed}", clean=30)
    mean, one, _ = with_means(rows_of(study))
    assert all(mean[f"accuracy/clean{end}"] == pytest.approx(one[f"accuracy/clean{end}"]) for end in ("", "/low", "/high"))


def test_a_flag_of_one_seed_marks_the_mean(make_study):
    study = make_study("flagged", "grid.schemes=[SL]", "seeds=[0, 1]")
    for seed in (0, 1):
        metrics = measure(study, f"SL-AT-s{seed}", clean=30, worst_case=10)
        study.workspace.report(f"SL-AT-s{seed}").joinpath("metrics.json").write_text(json.dumps(metrics | {"diagnostics/flags": seed}))
    mean, clean, flagged = with_means(rows_of(study))
    assert cell(mean, "accuracy/worst_case").endswith("!") and cell(flagged, "accuracy/worst_case").endswith("!")
    assert not cell(clean, "accuracy/worst_case").endswith("!")


def seeds_of(*flags: dict) -> list[dict]:
    return [shares() | {"model": f"SL-AT-s{n}", "scheme": "SL", "regime": "AT", "seed": n} | each for n, each in enumerate(flags)]


@pytest.mark.parametrize(
    ("first", "second", "mark"),
    [
        ({"diagnostics/flags": 0}, {"diagnostics/flags": 0, "transfer/flags": 1}, "!"),
        ({}, {"diagnostics/flags": 1}, "!"),
        ({}, {"diagnostics/flags": 0}, "?"),
    ],
)
def test_a_doubt_about_one_seed_marks_the_mean_where_the_other_seed_has_none(first, second, mark):
    assert cell(with_means(seeds_of(first, second))[0], "accuracy/worst_case").endswith(mark)


def test_the_footnote_of_several_seeds_names_a_model_that_show_knows():
    assert to_markdown(seeds_of(*[{"diagnostics/flags": 1}] * 2)).endswith("see advml show SL-AT-s0\n")
