"""`report`: the table and the picture of all evaluated models of the grid, in `reports/`."""

from __future__ import annotations

from advml import tracking
from advml.checkpoint import write_atomically
from advml.config import Config
from advml.errors import UserError
from advml.figures import charts
from advml.report import table as tables
from advml.report.table import NORM_NAMES
from advml.stages.context import Context


def run(context: Context) -> list[tables.Row]:
    """Write `reports/summary.csv`, `summary.md` and `summary.png`; returns the rows."""
    config, reports = context.config, context.workspace.reports
    table = tables.grid_rows(config, context.workspace)
    if not table:
        raise UserError(f"{reports} holds no metrics.json of any model of the grid; measure them with: dvc repro")
    write_atomically(reports / "summary.csv", tables.to_csv(table).encode())
    write_atomically(reports / "summary.md", tables.to_markdown(table).encode())
    write_atomically(reports / "summary.png", charts.to_png(charts.accuracy_chart(table, threat_model=_threat(config))))
    with tracking.open_run(
        config, root=context.workspace.root, name="study", kind="study", tags={}, params=config.model_dump(mode="json")
    ) as run:
        run.log_table(table, "summary.json")
        for name in ("summary.md", "summary.csv", "summary.png"):
            run.log_file(reports / name)
    return table


def _threat(config: Config) -> str:
    return f"{config.attacked_epsilon:.4g} ({NORM_NAMES[config.threat_model.norm]})"
