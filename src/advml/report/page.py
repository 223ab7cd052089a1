"""`reports/report.html`: the whole study on one page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from advml.config import Config
from advml.core.paths import Workspace
from advml.evaluation import records
from advml.evaluation.flag_summary import flag_summary, transfer_flags
from advml.figures.accuracy import accuracy_chart
from advml.figures.claims import effects
from advml.figures.style import to_png
from advml.figures.transfer import transfer_matrices
from advml.report import external_models, figures
from advml.report import figures as drawn
from advml.report import methods_table as how_made
from advml.report.table import COLUMNS, NORM_NAMES, Row, cell, footnote

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
        provenance: `data`, `digest`, `remarks` on the data, `commit` (None: made outside of git), `version`.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    found = records.read_transfer(workspace)
    drawings = _figures(config, workspace, table, claims)
    evaluated = {row["model"]: records.read(workspace, "evaluate", row["model"]) or {} for row in table}
    given = external_models.read(workspace)
    shown = external_models.of_data(given, provenance["digest"])
    made = _how(workspace, evaluated | shown, flags=transfer_flags(found))
    drawings |= {"security": figures.security(table, evaluated, seed=config.seeds[0]), "corruptions": figures.corruptions(table)}
    drawings["transfer"] = transfer_matrices(found["seeds"]) if found else None
    return template.render(
        config=config,
        norm=NORM_NAMES[config.threat_model.norm],
        accuracy_columns=list(COLUMNS),
        representation_columns=list(REPRESENTATION),
        rows=[_row(row) for row in table],
        notes=footnote(table).splitlines(),
        others=[_row(external_models.row(name, record)) for name, record in shown.items()],
        elsewhere=sorted(given.keys() - shown.keys()),
        claims=claims,
        tested=any("effect" in part for claim in claims["claims"] for part in claim["parts"]),
        images={name: _source(figure) for name, figure in drawings.items() if figure is not None},
        panels={kind: _embedded(path.read_bytes()) for kind, path in drawn.panels(workspace).items()},
        shown=drawn.shown(workspace),
        transfer=found,
        flags=figures.flags(evaluated | shown),
        unjudged=figures.unjudged(evaluated | shown),
        judged=[name for name, record in (evaluated | shown).items() if "evidence" in record.get("diagnostics", {})],
        made=made,
        how_headers=how_made.HEADERS,
        corruption_headers=how_made.CORRUPTION_HEADERS,
        cascade=how_made.cascade(made),
        provenance=provenance,
    )


def _row(row: Row) -> dict[str, Any]:
    return {
        "model": row["model"],
        "scheme": row.get("scheme", ""),
        "attacked": f"{NORM_NAMES[row['norm']]} {row['epsilon']:.4g}" if "norm" in row else "",
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
        "accuracy": accuracy_chart(table, threat_model=threat),
        "claims": effects(claims["claims"]),
        "clean": drawn.matrices(config, workspace, "clean", seed=seed),
        "clean_adversarial": drawn.matrices(config, workspace, "clean_adversarial", seed=seed),
        "curves": drawn.curves(config, workspace, seed=seed),
    }


def _source(figure: Figure) -> str:
    return _embedded(to_png(figure, dpi=130))


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _how(workspace: Workspace, evaluated: Mapping[str, Any], *, flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How each figure of each model was made, from the records; `flags` of a transfer, by model."""
    found = []
    for name, record in ((name, record) for name, record in evaluated.items() if record):
        represented = records.read(workspace, "represent", name)
        said = flag_summary(record.get("diagnostics", {}), flags.get(name, ()))
        about = {"model": name, "weights": record["digest"][:12], "figures": how_made.rows(record["figures"], flags=said)}
        about |= {"corruptions": how_made.corruptions(record.get("corruptions", {})), "cascade": how_made.steps(record["figures"])}
        found.append(about | {"representation": represented["how"] if represented else {}})
    return found
