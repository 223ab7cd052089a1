"""DVC, which takes a second to import, in a process of its own.

`python -m advml.engine.dvc_process plan` prints as JSON what DVC would run, `changes` why. `run STAGE` is `dvc repro --single-item STAGE`,
but for one thing: a kill leaves no half dvc.lock.
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
    """Stages of dvc.yaml that have changed, with everything behind them, in order -> all stages that each needs, directly or not."""
    with Repo() as repo:
        graph, changed = repo.index.graph, set(repo.status(targets=["dvc.yaml"]))
        needs = {stage.addressing: [one.addressing for one in descendants(graph, stage)] for stage in repo.stage.collect("dvc.yaml")}
    return {name: before for name, before in needs.items() if changed.intersection([name, *before])}


def changes() -> dict[str, list[str]]:
    """Stages of dvc.yaml that have changed themselves -> what of each: `params.yaml attack.steps modified`, `data/prepared deleted`, ..."""
    with Repo() as repo:
        found = {name: [line for entry in entries for line in _lines(entry)] for name, entries in repo.status(targets=["dvc.yaml"]).items()}
        ran = {stage.addressing for stage in repo.stage.collect("dvc.yaml") if any(out.hash_info for out in stage.outs)}
    return {name: lines if name in ran else ["has not run yet"] for name, lines in found.items()}


def _lines(entry: object, path: str = "") -> list[str]:
    """Of `changed command`, or of {"changed deps": {"params.yaml": {"attack.steps": "modified"}}}."""
    if isinstance(entry, dict):
        below = [(path if key.startswith("changed ") else f"{path} {key}".strip(), value) for key, value in entry.items()]
        return [line for name, value in below for line in _lines(value, name)]
    return [f"{path} {entry}".strip()]


@contextlib.contextmanager
def modify_at_once(path: str, **_: object) -> Iterator[dict]:
    """DVC's `modify_yaml`, which takes 0.7 s to write the dvc.lock of 78 stages, as one replacement of the file."""
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
