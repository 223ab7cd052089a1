"""Use DVC in a process of its own, because its import takes a second.

`python -m advml.engine.dvc_process plan` prints as JSON the stages that DVC would run, `changes` the reasons. `run STAGE` equals
`dvc repro --single-item STAGE`, except that a kill leaves no partial dvc.lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dvc import cli, dvcfile
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update
from networkx import descendants


def plan() -> dict[str, list[str]]:
    """Changed stages of dvc.yaml, and all that depend on them, in order -> all stages that each needs, directly or indirectly."""
    with Repo() as repo:
        graph, changed = repo.index.graph, set(repo.status(targets=["dvc.yaml"]))
        needs = {stage.addressing: [one.addressing for one in descendants(graph, stage)] for stage in repo.stage.collect("dvc.yaml")}
    return {name: before for name, before in needs.items() if changed.intersection([name, *before])}


def changes() -> dict[str, list[str]]:
    """Changed stages of dvc.yaml -> their changes: `params.yaml attack.steps modified`, `data/prepared deleted`, ..."""
    with Repo() as repo:
        found = {name: [line for entry in entries for line in _lines(entry)] for name, entries in repo.status(targets=["dvc.yaml"]).items()}
        ran = {stage.addressing for stage in repo.stage.collect("dvc.yaml") if any(out.hash_info for out in stage.outs)}
    return {name: lines if name in ran else ["has not run yet"] for name, lines in found.items()}


def _lines(entry: object, path: str = "") -> list[str]:
    """Lines for an entry of DVC's status: `changed command`, or {"changed deps": {"params.yaml": {"attack.steps": "modified"}}}."""
    if isinstance(entry, dict):
        below = [(path if key.startswith("changed ") else f"{path} {key}".strip(), value) for key, value in entry.items()]
        return [line for name, value in below for line in _lines(value, name)]
    return [f"{path} {entry}".strip()]


@contextlib.contextmanager
def modify_at_once(path: str, **_: object) -> Iterator[dict]:
    """Replacement of DVC's `modify_yaml` that writes atomically; DVC's takes 0.7 s to write the dvc.lock of 78 stages in place."""
    file, whole = Path(path), Path(f"{path}.part")
    content = parse_yaml_for_update(file.read_text(encoding="utf-8"), path) if file.exists() else {}
    yield content
    whole.write_text(dumps_yaml(content), encoding="utf-8")
    os.replace(whole, file)


if __name__ == "__main__":
    what, *stages = sys.argv[1:]
    if what == "run":
        dvcfile.modify_yaml = modify_at_once
        sys.exit(cli.main(["--wait-for-lock", "repro", "--single-item", *stages]))
    try:
        print(json.dumps({"plan": plan, "changes": changes}[what]()))
    except DvcException as error:
        sys.exit(" ".join(str(error).split()))
