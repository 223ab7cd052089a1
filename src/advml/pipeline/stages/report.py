"""Stage `report`: write table, chart, claims and HTML page of all evaluated models of the grid, in `reports/`."""

from __future__ import annotations

from functools import partial

from advml import __version__, tracking
from advml.claims.evidence import Study, accuracy_difference
from advml.claims.testing import check
from advml.config import ThreatModelSection
from advml.core.errors import UserError
from advml.core.io import to_csv, to_json, write_atomically
from advml.data import datasets
from advml.figures.accuracy import accuracy_chart
from advml.figures.style import to_png
from advml.pipeline.context import Context
from advml.report import figures, page
from advml.report import table as tables
from advml.report.finding import WORST, finding


def run(context: Context) -> list[tables.Row]:
    """Write `paths.REPORT_FILES` and `paths.DVC_FILES` into `reports/`; returns the table's rows."""
    config, workspace, reports = context.config, context.workspace, context.workspace.reports
    table = tables.grid_rows(config.grid, config.seeds, workspace)
    if not table:
        raise UserError(f"{reports} contains no metrics.json of any model of the grid; evaluate them with: dvc repro")
    attacked = ThreatModelSection(norm=config.threat_model.norm, epsilon=config.attacked_epsilon)
    claims = check(
        workspace,
        seeds=config.seeds,
        epsilon=config.threat_model.epsilon,
        attacked=attacked,
        others=config.similarity.epsilon_studies,
        measures=config.similarity.measures,
    )
    # The whole configuration, except addresses of stores, which change no result and may contain passwords.
    claims |= context.made_by(config.model_dump(mode="json", exclude={"tracking", "tune"}))
    data = context.provenance["data"]
    about = {"data": data["source"], "digest": data["digest"], "remarks": datasets.remarks(context.dataset)}
    about |= {"commit": context.provenance["git_commit"], "version": __version__}
    settings = page.Settings(
        grid=config.grid,
        seeds=config.seeds,
        data=config.data.name,
        backbone=config.model.backbone,
        attacked=attacked,
        evaluate=config.evaluate,
        diagnostics=config.diagnostics,
        corruptions=config.corruptions,
    )
    minus = partial(accuracy_difference, [Study(attacked, workspace, seed) for seed in config.seeds], WORST)
    claims["finding"] = finding(table, claims, threat_model=settings.threat_model, minus=minus)
    write_atomically(reports / "summary.csv", to_csv(table))
    write_atomically(reports / "summary.md", tables.to_markdown(table).encode())
    write_atomically(reports / "summary.png", to_png(accuracy_chart(table, threat_model=settings.threat_model)))
    write_atomically(reports / "results.json", to_json(tables.slim(table)))
    write_atomically(reports / "training.csv", to_csv(tables.training_rows(table, workspace)))
    if grid := figures.matrices(config.grid, workspace, "clean", seed=config.seeds[0]):
        write_atomically(reports / "cka.png", to_png(grid, dpi=110))
    write_atomically(reports / "claims.json", to_json(claims))
    write_atomically(reports / "report.html", page.render(settings, workspace, table, claims, provenance=about).encode())
    tracking.log_result(context.tracking, "study")
    return table
