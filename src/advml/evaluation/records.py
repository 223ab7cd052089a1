"""Records of measurements, `records/<stage>/<MODEL>.json`: a stage's figures, and how it measured them.

`reports/<MODEL>/metrics.json` is assembled from them, so every stage that measures a model can write it. Does not import torch, for
`tracking`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from advml.core.errors import UserError
from advml.core.io import read_json, sha256, to_csv, to_json, write_atomically
from advml.core.paths import Workspace

MEASURING = ("evaluate", "represent")  # stages with records, in the order of their metrics


def write(workspace: Workspace, stage: str, record: dict[str, Any]) -> dict[str, float]:
    """Write a model's record, and update its metrics.json; returns the content of the latter.

    Args:
        record: `model`, `digest` (of the weights), `inputs` (fingerprint), `metrics` (flat), and explanations of them.
    """
    path = workspace.record(stage, record["model"])
    write_atomically(path, to_json(record))
    return publish(workspace, record["model"], digest=record["digest"])


def publish(workspace: Workspace, model: str, *, digest: str) -> dict[str, float]:
    """Assemble a model's metrics.json from its records, and return it; also called for reused records, after which a kill may have come."""
    metrics = metrics_of(workspace, model, digest=digest)
    write_atomically(workspace.report(model) / "metrics.json", to_json(metrics))
    return metrics


def read(workspace: Workspace, stage: str, model: str) -> dict[str, Any] | None:
    """Read a model's record; None if there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = workspace.record(stage, model)
    if not path.exists():
        return None
    record = read_json(path, needs=("model", "metrics"), remedy="measure again with: dvc repro")
    return record if record["model"] and isinstance(record["metrics"], dict) else None


def metrics_of(workspace: Workspace, model: str, *, digest: str) -> dict[str, float]:
    """All metrics measured on the weights with this sha256, without those that are null."""
    found = [read(workspace, stage, model) for stage in MEASURING]
    parts = [record["metrics"] for record in found if record and record.get("digest") == digest]
    return {name: value for part in parts for name, value in part.items() if value is not None}


def reusable(workspace: Workspace, stage: str, model: str, *, inputs: str) -> dict[str, Any] | None:
    """Record that was made from the same inputs; None if there is none."""
    try:
        record = read(workspace, stage, model)
    except UserError:
        return None
    return record if record and record.get("inputs") == inputs else None


# Transfer between models: transfer.json, transfer.csv, and the record on which the report depends

TRANSFER, MATRIX = "transfer", "matrix"
NO_PAIRS = "transfer needs two trained and evaluated models per seed; the grid has none"

Block = dict[str, Any]


def transfer_rows(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Rows of transfer.csv: one per pair of source and target."""
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
        rule: description of the rule that raises flags.
        picture: a PNG; None if there are no blocks.
        made_by: parameters and git commit, for the MLflow run.
    """
    folder = workspace.report(TRANSFER)
    content = {"rule": rule, "seeds": list(blocks), **made_by} | ({} if blocks else {"reason": NO_PAIRS})
    text = to_json(content, indent=1)
    for name, data in (("transfer.csv", to_csv(transfer_rows(blocks)) if blocks else None), ("transfer.png", picture)):
        if data:
            write_atomically(folder / name, data)
        else:
            (folder / name).unlink(missing_ok=True)  # an earlier file would be outdated
    write_atomically(folder / "transfer.json", text)
    digests = {name: digest for block in blocks for name, digest in block["digests"].items()}
    record = {"digests": digests, "transfer": sha256(text)}
    write_atomically(workspace.record(TRANSFER, MATRIX), to_json(record, indent=1))


def read_transfer(workspace: Workspace) -> dict[str, Any] | None:
    """Read a transfer: `rule`, and the blocks `seeds`; None if there are none, or if they were made with other weights than `evaluate`.

    Raises:
        UserError: the files are damaged, or transfer.json does not match the record.
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


# Flags of a model, from the record of its diagnostics and from a transfer

NONE, UNJUDGED = "none", "not judged"
AT_CHANCE = "at_chance"  # flag of `masking.rules.at_chance`


def flag_summary(diagnostics: Mapping[str, Any], transferred: Iterable[Mapping[str, Any]] = ()) -> str:
    """Names of a model's flags; `none`, or `not judged` if the probes were not run.

    Args:
        diagnostics: the entry of that name in the record of `evaluate`.
        transferred: the model's entry in the result of `transfer_flags`.
    """
    flags = [flag["name"] for flag in (*diagnostics.get("flags", ()), *transferred)]
    return ", ".join(flags) or (NONE if "evidence" in diagnostics else UNJUDGED)


def is_at_chance(record: Mapping[str, Any] | None) -> bool:
    """Whether the record of `evaluate` has the flag AT_CHANCE; False without record."""
    return any(flag["name"] == AT_CHANCE for flag in (record or {}).get("diagnostics", {}).get("flags", ()))


def transfer_flags(found: Mapping[str, Any] | None) -> dict[str, list[dict[str, str]]]:
    """Flags by model, from the result of `read_transfer`."""
    flags: dict[str, list[dict[str, str]]] = {}
    for block in (found or {"seeds": ()})["seeds"]:
        for flag in block["flags"]:
            flags.setdefault(flag["model"], []).append(flag)
    return flags
