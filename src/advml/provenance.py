"""What made a result: the git commit and the DVC stage for people, a digest of the sources for resuming."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path


@functools.cache
def git_commit(root: Path) -> str | None:
    """The commit checked out at `root`, with `-dirty` behind it if tracked files differ; None outside of git.

    A dvc.lock does not count: DVC writes it while it runs a pipeline, so the second stage would seem to run other sources.
    """
    tracked = ["--untracked-files=no", "--", ":(top)", ":(top,exclude,glob)**/dvc.lock"]
    try:
        commit, changed = _git(root, "rev-parse", "HEAD"), _git(root, "--no-optional-locks", "status", "--porcelain", *tracked)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


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
