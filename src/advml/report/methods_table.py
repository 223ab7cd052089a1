"""Tables of how each accuracy was measured, from the records: one per model, and one of its corruptions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

# Column -> key or function that fills it from a figure's record; empty if the record lacks the key.
COLUMNS: dict[str, Any] = {
    "attack": lambda r: f"{r['attack']}, {r['objective']}" if "objective" in r else r["attack"],
    "norm": lambda r: r["norm"],
    "ε": lambda r: f"{r['epsilon']:.4g}",
    "box": lambda r: f"{r['box']}",
    "steps": lambda r: f"{r['queries']} queries" if r["attack"] == "square" else r["steps"],
    "targets": lambda r: r["targets"] if r["attack"] in ("apgd-t", "fab-t") else "",
    "step size": lambda r: f"{r['step_size']:.4g}",
    "runs": lambda r: r["restarts"],
    "start": lambda r: "random" if r["random_start"] else "image",
    "iterate": lambda r: r["keep"],
    "seed": lambda r: r["seed"],
    "forward": lambda r: f"{r['forward']:,}",
    "backward": lambda r: f"{r['backward']:,}",
}
HEADERS = ("figure", "right", "of", "95 % interval", "flags", *COLUMNS)
CORRUPTED = {
    "n": lambda r: r["n"],
    "accuracy": lambda r: f"{100 * sum(r['accuracies']) / len(r['accuracies']):.1f}",
    "95 % interval": lambda r: _interval(r),
    "at severity": lambda r: ", ".join(f"{s}: {100 * share:.1f}" for s, share in zip(r["severities"], r["accuracies"], strict=True)),
    "images": lambda r: f"computed by {r['library']}" if r["source"] == "computed" else f"published, {r['source']}",
    "libraries": lambda r: ", ".join(f"{name} {r[name]}" for name in ("numpy", "scipy", "PIL", "torch") if name in r),
    "seed": lambda r: r["seed"],
}
CORRUPTION_HEADERS = ("figure", *CORRUPTED)


def rows(figures: dict[str, dict[str, Any]], *, flags: str = "") -> list[list[Any]]:
    """Rows per figure; below the worst case, one per attack of its cascade, with the numbers of images attacked and survived, or not run.

    Args:
        flags: of the model, shown with its attacked figures.
    """
    return [row for name, record in figures.items() for row in _rows(name, record, flags)]


def corruptions(figures: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """Rows per corruption, with the columns CORRUPTION_HEADERS."""
    return [[name, *(_cell(fill, record) for fill in CORRUPTED.values())] for name, record in figures.items()]


def steps(figures: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the attacks in a model's worst case, besides the threat models."""
    names = [step["name"] for record in figures.values() for step in record.get("cascade", ())]
    return [name for name in names if not name.startswith("threat_model_")]


def not_run(evaluated: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Attacks that were asked for and not run on any of the models, from their records -> reason."""
    found = (figure.get("not_run", {}) for record in evaluated for figure in record.get("figures", {}).values())
    return {name: reason for each in found for name, reason in each.items()}


def cascade(models: list[dict[str, Any]]) -> list[str]:
    """Names of the attacks in all models' worst cases, in order."""
    return list(dict.fromkeys(name for model in models for name in model["cascade"]))


def _rows(name: str, record: dict[str, Any], flags: str) -> Iterator[list[Any]]:
    yield [name, record["correct"], record["n"], _interval(record), flags if "attack" in record else "", *_cells(record)]
    for step in record.get("cascade", ()):
        yield [f"— {step['name']}", step["aimed_at"] - step["broke"], step["aimed_at"], "", "", *_cells(step | {"seed": record["seed"]})]
    for attack, reason in record.get("not_run", {}).items():
        yield [f"— {attack}", "", "", "", "", *_cells({"attack": f"not run: {reason}"})]


def _interval(record: dict[str, Any]) -> str:
    low, high = record["interval"]
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _cells(record: dict[str, Any]) -> list[Any]:
    return [_cell(fill, record) for fill in COLUMNS.values()]


def _cell(fill: Any, record: dict[str, Any]) -> Any:
    try:
        return fill(record)
    except KeyError:
        return ""
