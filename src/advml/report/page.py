"""`reports/report.html`: the whole study on one page that needs no other file."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from advml.config import Config
from advml.evaluation import records, transfer_files
from advml.figures import charts
from advml.figures.claims import effects
from advml.figures.style import to_png
from advml.figures.transfer import transfer_matrices
from advml.paths import Workspace, model_name
from advml.report import doubts
from advml.report import figures as drawn
from advml.report import how as how_made
from advml.report.table import COLUMNS, NORM_NAMES, Row, cell

REPRESENTATION = {  # column -> metric, and its number of digits
    "redundancy": "cka/redundancy",
    "clean-adv. CKA": "cka/clean_adversarial",
    "effective layers": "cka/effective_layers",
    "RankMe": "cka/rankme",
}


def render(config: Config, workspace: Workspace, table: list[Row], claims: Mapping[str, Any], *, provenance: Mapping[str, Any]) -> str:
    """The page.

    Args:
        table: the grid's rows.
        claims: the content of claims.json.
        provenance: `data`, `commit`, `version`.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    made = list(_how(config, workspace))
    transferred = transfer_files.read(workspace)
    drawings = _figures(config, workspace, table, claims)
    evaluated = {row["model"]: records.read(workspace, "evaluate", row["model"]) or {} for row in table}
    drawings |= {"security": doubts.curves(table, evaluated, seed=config.seeds[0]), "corruptions": doubts.corruptions(table)}
    drawings["transfer"] = transfer_matrices(transferred["seeds"]) if transferred else None
    return template.render(
        config=config,
        norm=NORM_NAMES[config.threat_model.norm],
        accuracy_columns=list(COLUMNS),
        representation_columns=list(REPRESENTATION),
        rows=[_row(row) for row in table],
        claims=claims,
        tested=any("effect" in part for claim in claims["claims"] for part in claim["parts"]),
        images={name: _source(figure) for name, figure in drawings.items() if figure is not None},
        panels={kind: _embedded(path.read_bytes()) for kind, path in drawn.panels(workspace).items()},
        shown=drawn.shown(workspace),
        transfer=transferred,
        flags=doubts.flags(evaluated),
        doubtful=sorted(name for name, record in evaluated.items() if "evidence" in record.get("diagnostics", {})),
        made=made,
        how_headers=how_made.HEADERS,
        cascade=how_made.cascade(made),
        provenance=provenance,
    )


def _row(row: Row) -> dict[str, Any]:
    return {
        "model": row["model"],
        "scheme": row["scheme"],
        "accuracy": [cell(row, metric) for metric in COLUMNS.values()],
        "representation": [_number(row, metric) for metric in REPRESENTATION.values()],
    }


def _number(row: Row, metric: str) -> str:
    """`0.828 [0.817, 0.839]`, or a dash."""
    if metric not in row:
        return "-"
    digits = 3 if row[metric] < 10 else 1
    ends = [row.get(f"{metric}/{end}") for end in ("low", "high")]
    interval = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if None not in ends else ""
    return f"{row[metric]:.{digits}f}{interval}"


def _figures(config: Config, workspace: Workspace, table: list[Row], claims: Mapping[str, Any]) -> dict[str, Figure | None]:
    seed = config.seeds[0]
    threat = f"{config.attacked_epsilon:.4g} ({NORM_NAMES[config.threat_model.norm]})"
    return {
        "accuracy": charts.accuracy_chart(table, threat_model=threat),
        "claims": effects(claims["claims"]),
        "clean": drawn.matrices(config, workspace, "clean", seed=seed),
        "clean_adversarial": drawn.matrices(config, workspace, "clean_adversarial", seed=seed),
        "curves": drawn.curves(config, workspace, seed=seed),
    }


def _source(figure: Figure) -> str:
    return _embedded(to_png(figure, dpi=130))


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _how(config: Config, workspace: Workspace) -> list[dict[str, Any]]:
    """How each figure of each model was made, from the records."""
    found = []
    for seed, scheme, regime in itertools.product(config.seeds, config.grid.schemes, config.grid.regimes):
        name = model_name(scheme, regime, seed)
        evaluated, represented = (records.read(workspace, stage, name) for stage in records.MEASURING)
        if evaluated:
            how = represented["how"] if represented else {}
            figures = how_made.rows(evaluated["figures"])
            about = {"model": name, "weights": evaluated["digest"][:12], "figures": figures, "representation": how}
            found.append(about | {"cascade": how_made.steps(evaluated["figures"])})
    return found
