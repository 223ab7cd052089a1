"""Figures that others have published stand in the report of a study that can be compared with them, and of no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advml.config import ThreatModelSection
from advml.core.io import to_json, write_atomically
from advml.pipeline.stages import report as stage
from advml.report import page, published

THEIRS = {"data": "cifar10", "backbone": "resnet18", "attacked": ThreatModelSection(norm="linf", epsilon=8 / 255)}


def test_each_method_has_a_row_for_each_regime_of_the_study():
    rows = published.comparable(**THEIRS, regimes=["ST", "AT", "Full-AT"])
    assert ["ACL", "Full-AT", "81.2", "49.6", "72.5"] in rows and ["DeACL", "AT", "80.8", "46.1", "-"] in rows
    assert {row[1] for row in rows} == {"AT", "Full-AT"} and all(len(row) == len(published.HEADERS) for row in rows)


@pytest.mark.parametrize(
    "other",
    [
        {"data": "digits"},
        {"backbone": "resnet50"},
        {"attacked": ThreatModelSection(norm="l2", epsilon=8 / 255)},
        {"attacked": ThreatModelSection(norm="linf", epsilon=4 / 255)},
    ],
)
def test_a_study_that_differs_shows_none(other):
    assert not published.comparable(**(THEIRS | other), regimes=["AT"])


def test_the_page_names_them_as_published(make_study, monkeypatch):
    study, render = make_study("published", "grid.schemes=[SL]"), page.render
    metrics = {f"accuracy/{name}{end}": 0.5 for name in ("clean", "worst_case") for end in ("", "/low", "/high")}
    write_atomically(study.workspace.report("SL-ST-s0") / "metrics.json", to_json(metrics))
    monkeypatch.setattr(page, "render", lambda settings, *rest, **more: render(replace(settings, **THEIRS), *rest, **more))
    stage.run(study.context())
    section = (study.workspace.reports / "report.html").read_text().partition("<h2>Published figures")[2].partition("<h2>")[0]
    assert "Not measured here" in section and "<td>DynACL++</td><td>AT</td>" in section
