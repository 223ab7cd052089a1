"""What made a result: the git commit and the DVC stage for people, a digest of the sources for resuming."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path


@functools.cache
def git_commit(root: Path) -> str:
    """The commit checked out at `root`, with `-dirty` behind it if tracked files differ; "unknown" outside of git."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],  # no tag: always the plain commit
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def dvc_stage() -> str | None:
    """The stage that DVC runs in this process, as it is addressed (`finetune_at@CL-AT-0`); None without DVC."""
    return os.environ.get("DVC_STAGE") or None


@functools.cache
def source_digest() -> str:
    """sha256 over the package's own sources: an interrupted stage is not resumed under other code."""
    package = Path(__file__).parent
    sources = sorted(package.rglob("*.py"))
    parts = (hashlib.sha256(source.read_bytes()).hexdigest() + str(source.relative_to(package)) for source in sources)
    return hashlib.sha256("".join(parts).encode()).hexdigest()
