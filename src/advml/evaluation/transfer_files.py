"""What is written of a transfer between models: transfer.json, transfer.csv, and the record that the report depends on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from advml.core.io import write_atomically
from advml.errors import UserError
from advml.evaluation import records
from advml.paths import Workspace

STAGE, NAME = "transfer", "matrix"
NOBODY = "no seed of the grid has two trained and evaluated models: there is nobody to transfer to"

Block = dict[str, Any]


def rows(blocks: Sequence[Block]) -> list[dict[str, Any]]:
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


def write(workspace: Workspace, blocks: Sequence[Block], *, rule: str, picture: bytes | None, made_by: Mapping[str, Any]) -> None:
    """Write the files into `reports/transfer/`, and the record last.

    Args:
        rule: of the flags, in words.
        picture: a PNG, where there are blocks.
        made_by: parameters and git commit, for the MLflow run.
    """
    folder = workspace.report(STAGE)
    content = {"rule": rule, "seeds": list(blocks), **made_by} | ({} if blocks else {"reason": NOBODY})
    text = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    for name, data in (("transfer.csv", _to_csv(rows(blocks))), ("transfer.png", picture)):
        if data:
            write_atomically(folder / name, data)
        else:
            (folder / name).unlink(missing_ok=True)  # an earlier one would show what is no longer there
    write_atomically(folder / "transfer.json", text)
    digests = {name: digest for block in blocks for name, digest in block["digests"].items()}
    record = {"digests": digests, "transfer": hashlib.sha256(text).hexdigest()}
    write_atomically(workspace.record(STAGE, NAME), (json.dumps(record, indent=1) + "\n").encode())


def _to_csv(table: list[dict[str, Any]]) -> bytes | None:
    if not table:
        return None
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return stream.getvalue().encode()


def read(workspace: Workspace) -> dict[str, Any] | None:
    """`rule`, and the blocks `seeds`, if they are of the weights that `evaluate` has measured; None if not, or if there are none.

    Raises:
        UserError: the files are damaged, or transfer.json is not the one of the record.
    """
    path, made = workspace.report(STAGE) / "transfer.json", workspace.record(STAGE, NAME)
    if not made.exists():
        return None
    try:
        record, text = json.loads(made.read_text(encoding="utf-8")), path.read_bytes()
        content = json.loads(text)
        found = {"rule": str(content["rule"]), "seeds": list(content["seeds"])}
        whole = record["transfer"] == hashlib.sha256(text).hexdigest()
        digests = dict(record["digests"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} or {made} is damaged ({error}); measure again with: dvc repro, or advml transfer") from None
    if not whole:
        raise UserError(f"{path} is not the file that {made} describes; measure again with: dvc repro, or advml transfer")
    now = {name: (records.read(workspace, "evaluate", name) or {}).get("digest") for name in digests}
    return found if now == digests and found["seeds"] else None
