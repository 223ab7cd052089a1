"""`reports/report.html`: all results of a study on one self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from advml.config import Corruptions, Diagnostics, EvaluationAttack, Grid, ThreatModelSection
from advml.core.paths import Workspace
from advml.evaluation import records
from advml.evaluation.records import flag_summary, transfer_flags
from advml.figures.accuracy import accuracy_chart
from advml.figures.claims import effects
from advml.figures.style import NORM_NAMES, to_png
from advml.figures.transfer import transfer_matrices
from advml.recipes import REGIMES, SCHEMES
from advml.report import figures, published
from advml.report import methods_table as how_made
from advml.report.table import COLUMNS, Row, cell, footnote, given_records, given_row, with_means

REPRESENTATION = {  # column -> metric and number of digits
    "redundancy": "cka/redundancy",
    "clean-adv. CKA": "cka/clean_adversarial",
    "effective layers": "cka/effective_layers",
    "RankMe": "cka/rankme",
}
CSS_PIXELS_PER_INCH = 130  # of a figure's size


@dataclass(frozen=True)
class Settings:
    """Settings of the study shown on the page; `data`: its name; `attacked`: norm and epsilon of the evaluation's attacks."""

    grid: Grid
    seeds: tuple[int, ...]
    data: str
    backbone: str
    attacked: ThreatModelSection
    evaluate: EvaluationAttack
    diagnostics: Diagnostics
    corruptions: Corruptions

    @property
    def threat_model(self) -> str:
        """`0.15 (L-infinity)`."""
        return f"{self.attacked.epsilon:.4g} ({NORM_NAMES[self.attacked.norm]})"


def render(settings: Settings, workspace: Workspace, table: list[Row], claims: Mapping[str, Any], *, provenance: Mapping[str, Any]) -> str:
    """Render the HTML page.

    Args:
        settings: of the study.
        table: rows of the grid's models.
        claims: the content of claims.json.
        provenance: `data`, `digest`, `remarks` on the data, `commit` (None: outside of git), `version`.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    found = records.read_transfer(workspace)
    drawings = _figures(settings, workspace, table, claims)
    evaluated = {row["model"]: records.read(workspace, "evaluate", row["model"]) or {} for row in table}
    given = given_records(workspace)
    # Only those evaluated on the same images
    shown = {name: record for name, record in given.items() if record["data_digest"] == provenance["digest"]}
    made = _how(workspace, evaluated | shown, flags=transfer_flags(found))
    drawings |= {"security": figures.security(table, evaluated, seed=settings.seeds[0]), "corruptions": figures.corruptions(table)}
    drawings["transfer"] = transfer_matrices(found["seeds"]) if found else None
    return template.render(
        settings=settings,
        detailed={model["model"] for model in made},
        schemes=SCHEMES,
        regimes=REGIMES,
        norm=NORM_NAMES[settings.attacked.norm],
        accuracy_columns=list(COLUMNS),
        representation_columns=list(REPRESENTATION),
        rows=[_row(row) for row in with_means(table)],
        notes=footnote(table).splitlines(),
        others=[_row(given_row(name, record)) for name, record in shown.items()],
        published=published.comparable(settings.data, settings.backbone, settings.attacked, settings.grid.regimes),
        published_headers=published.HEADERS,
        published_by=published.SOURCE,
        elsewhere=sorted(given.keys() - shown.keys()),
        claims=claims,
        tested=any("effect" in part for claim in claims["claims"] for part in claim["parts"]),
        images={name: _embedded(to_png(figure)) for name, figure in drawings.items() if figure is not None},
        panels={kind: _embedded(path.read_bytes()) for kind, path in figures.panels(workspace).items()},
        shown=figures.shown(workspace),
        trust=figures.trust(workspace, provenance["digest"]),
        transfer=found,
        flags=figures.flags(evaluated | shown),
        unjudged=figures.unjudged(evaluated | shown),
        judged=[name for name, record in (evaluated | shown).items() if "evidence" in record.get("diagnostics", {})],
        made=made,
        how_headers=how_made.HEADERS,
        corruption_headers=how_made.CORRUPTION_HEADERS,
        cascade=how_made.cascade(made),
        not_run=how_made.not_run(evaluated.values()),
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
    """Metric with its interval: `0.828 [0.817, 0.839]`, or a dash."""
    if metric not in row:
        return "-"
    digits = 3 if row[metric] < 10 else 1
    ends = [row.get(f"{metric}/{end}") for end in ("low", "high")]
    interval = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if None not in ends else ""
    return f"{row[metric]:.{digits}f}{interval}"


def _figures(settings: Settings, workspace: Workspace, table: list[Row], claims: Mapping[str, Any]) -> dict[str, Figure | None]:
    grid, seed = settings.grid, settings.seeds[0]
    return {
        "accuracy": accuracy_chart(table, threat_model=settings.threat_model),
        "claims": effects(claims["claims"]),
        "clean": figures.matrices(grid, workspace, "clean", seed=seed),
        "clean_adversarial": figures.matrices(grid, workspace, "clean_adversarial", seed=seed),
        "curves": figures.curves(grid, workspace, seed=seed),
    }


def _embedded(png: bytes) -> dict[str, Any]:
    """Source of a picture, and its width in CSS pixels: letters have one size in all pictures, and no pixel is enlarged."""
    with Image.open(io.BytesIO(png)) as picture:
        width = round(CSS_PIXELS_PER_INCH * picture.width / picture.info["dpi"][0])
    return {"source": f"data:image/png;base64,{base64.b64encode(png).decode()}", "width": width}


def _how(workspace: Workspace, evaluated: Mapping[str, Any], *, flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of how each figure of each model was measured, from the records; `flags`: those of transfer, by model."""
    found = []
    for name, record in ((name, record) for name, record in evaluated.items() if record):
        represented = records.read(workspace, "represent", name)
        said = flag_summary(record.get("diagnostics", {}), flags.get(name, ()))
        about = {"model": name, "weights": record["digest"][:12], "figures": how_made.rows(record["figures"], flags=said)}
        about |= {"corruptions": how_made.corruptions(record.get("corruptions", {})), "cascade": how_made.steps(record["figures"])}
        found.append(about | {"representation": represented["how"] if represented else {}})
    return found
