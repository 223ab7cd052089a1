"""Records of measurements: how a stage made its figures, and the figures. `records/<stage>/<MODEL>.json`.

`reports/<MODEL>/metrics.json` is put together from them, so each of the stages that measure a model may write it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from advml.core.errors import UserError
from advml.core.io import read_json, sha256, to_csv, to_json, write_atomically
from advml.core.paths import Workspace

MEASURING = ("evaluate", "represent")  # stages, in the order of their metrics


def write(workspace: Workspace, stage: str, record: dict[str, Any]) -> dict[str, float]:
    """Write a model's record, and its metrics.json anew; returns the latter.

    Args:
        record: `model`, `digest` (of the weights), `inputs` (fingerprint), `metrics` (flat), and whatever explains them.
    """
    path = workspace.record(stage, record["model"])
    write_atomically(path, to_json(record))
    return publish(workspace, record["model"], digest=record["digest"])


def publish(workspace: Workspace, model: str, *, digest: str) -> dict[str, float]:
    """Put a model's metrics.json together from its records; returns it. Also for records that are reused: a kill may have come between."""
    metrics = metrics_of(workspace, model, digest=digest)
    write_atomically(workspace.report(model) / "metrics.json", to_json(metrics))
    return metrics


def read(workspace: Workspace, stage: str, model: str) -> dict[str, Any] | None:
    """A model's record, or None if there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = workspace.record(stage, model)
    if not path.exists():
        return None
    record = read_json(path, needs=("model", "metrics"), remedy="measure again with: dvc repro")
    return record if record["model"] and isinstance(record["metrics"], dict) else None


def metrics_of(workspace: Workspace, model: str, *, digest: str) -> dict[str, float]:
    """All metrics measured on the weights with this sha256. What could not be measured is left out."""
    found = [read(workspace, stage, model) for stage in MEASURING]
    parts = [record["metrics"] for record in found if record and record.get("digest") == digest]
    return {name: value for part in parts for name, value in part.items() if value is not None}


def reusable(workspace: Workspace, stage: str, model: str, *, inputs: str) -> dict[str, Any] | None:
    """The record that the very same inputs have given, or None."""
    try:
        record = read(workspace, stage, model)
    except UserError:
        return None
    return record if record and record.get("inputs") == inputs else None


# The transfer between models: transfer.json, transfer.csv, and the record that the report depends on

TRANSFER, MATRIX = "transfer", "matrix"
NO_PAIRS = "transfer needs two trained and evaluated models of one seed; the grid has none"

Block = dict[str, Any]


def transfer_rows(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """A row per pair."""
    return [
        {
            "seed": block["seed"],
            "source": source,
            "target": target,
            "n": block["n"][s],
            "correct": block["correct"][s][t],
            "accuracy": block["accuracy"][s][t],
            "low": block["intervals"][s][t][0],
            "high": block["intervals"][s][t][1],
            "transfer_breaks": block["breaks"][t]["sources"].get(source, 0),
        }
        for block in blocks
        for s, source in enumerate(block["models"])
        for t, target in enumerate(block["models"])
    ]


def write_transfer(workspace: Workspace, blocks: Sequence[Block], *, rule: str, picture: bytes | None, made_by: Mapping[str, Any]) -> None:
    """Write the files into `reports/transfer/`, and the record last.

    Args:
        rule: of the flags, in words.
        picture: a PNG, where there are blocks.
        made_by: parameters and git commit, for the MLflow run.
    """
    folder = workspace.report(TRANSFER)
    content = {"rule": rule, "seeds": list(blocks), **made_by} | ({} if blocks else {"reason": NO_PAIRS})
    text = to_json(content, indent=1)
    for name, data in (("transfer.csv", to_csv(transfer_rows(blocks)) if blocks else None), ("transfer.png", picture)):
        if data:
            write_atomically(folder / name, data)
        else:
            (folder / name).unlink(missing_ok=True)  # an earlier one would show what is no longer there
    write_atomically(folder / "transfer.json", text)
    digests = {name: digest for block in blocks for name, digest in block["digests"].items()}
    record = {"digests": digests, "transfer": sha256(text)}
    write_atomically(workspace.record(TRANSFER, MATRIX), to_json(record, indent=1))


def read_transfer(workspace: Workspace) -> dict[str, Any] | None:
    """`rule`, and the blocks `seeds`, if they are of the weights that `evaluate` has measured; None if not, or if there are none.

    Raises:
        UserError: the files are damaged, or transfer.json is not the one of the record.
    """
    path, made = workspace.report(TRANSFER) / "transfer.json", workspace.record(TRANSFER, MATRIX)
    if not made.exists():
        return None
    try:
        record, text = json.loads(made.read_text(encoding="utf-8")), path.read_bytes()
        content = json.loads(text)
        found = {"rule": str(content["rule"]), "seeds": list(content["seeds"])}
        whole = record["transfer"] == sha256(text)
        digests = dict(record["digests"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} or {made} is damaged ({error}); measure again with: dvc repro, or advml transfer") from None
    if not whole:
        raise UserError(f"{path} is not the file that {made} describes; measure again with: dvc repro, or advml transfer")
    now = {name: (read(workspace, "evaluate", name) or {}).get("digest") for name in digests}
    return found if now == digests and found["seeds"] else None
