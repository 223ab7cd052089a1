"""`python -m advml.engine.dvc_stage STAGE`: `dvc repro --single-item STAGE`, whose dvc.lock is never half written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dvc import cli, dvcfile
from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update


@contextlib.contextmanager
def modify_at_once(path: str, **_: object) -> Iterator[dict]:
    """DVC's `modify_yaml`, but a process that is killed leaves no half dvc.lock: DVC takes 0.7 s to write that of 78 stages."""
    file, whole = Path(path), Path(f"{path}.part")
    content = parse_yaml_for_update(file.read_text(encoding="utf-8"), path) if file.exists() else {}
    yield content
    whole.write_text(dumps_yaml(content), encoding="utf-8")
    os.replace(whole, file)


if __name__ == "__main__":
    dvcfile.modify_yaml = modify_at_once
    sys.exit(cli.main(["--wait-for-lock", "repro", "--single-item", *sys.argv[1:]]))
