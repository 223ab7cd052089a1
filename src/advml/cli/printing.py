"""Output shared by several commands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from advml.core.messages import is_quiet
from advml.core.paths import Workspace

if TYPE_CHECKING:
    from advml.config import Config


def say(outputs: str, next_command: str) -> None:
    """Print the last two lines of a command: the files written, and the next command."""
    if not is_quiet():
        print(f"wrote {outputs}\nnext: {next_command}", flush=True)


def say_json(content: Any) -> None:
    """Print one JSON object, with null for values that are not finite."""
    from advml.core.io import to_json

    print(to_json(content).decode(), end="", flush=True)


def percent(metrics: dict[str, float]) -> str:
    """Accuracies of a model's metrics in %, on one line."""
    shown = {
        name.removeprefix("accuracy/").replace("corruption/mean", "corrupted"): value
        for name, value in metrics.items()
        if (name.startswith("accuracy/") or name == "corruption/mean") and name.count("/") == 1
    }
    return "  ".join(f"{name} {100 * value:.1f} %" for name, value in shown.items())


def show_table(configuration: Config, workspace: Workspace) -> list[dict[str, Any]]:
    """Print the table of the grid's measured models; returns its rows."""
    from rich.console import Console
    from rich.table import Table

    from advml.figures.style import NORM_NAMES
    from advml.report.table import COLUMNS, cell, footnote, grid_rows, with_means

    norm, epsilon = NORM_NAMES[configuration.threat_model.norm], configuration.attacked_epsilon
    title = f"Accuracy in % with 95 % intervals; threat models I and II and worst case over all attacks at {norm} epsilon {epsilon:.4g}"
    shown = Table(title=title)
    for header in ("model", *COLUMNS):
        shown.add_column(header, justify="left" if header == "model" else "right")
    rows = grid_rows(configuration.grid, configuration.seeds, workspace)
    for row in with_means(rows):
        shown.add_row(row["model"], *(cell(row, metric) for metric in COLUMNS.values()))
    if note := footnote(rows):
        shown.caption, shown.caption_justify = note, "left"
    Console(width=None if sys.stdout.isatty() else 200).print(shown)
    return rows
