"""What made a result: the git commit and the DVC stage for people, a digest of the sources for resuming."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path

LOCKS = ":(exclude,top,glob)**/dvc.lock"


@functools.cache
def git_commit(root: Path) -> str | None:
    """The last commit at `root` that changed anything, with `-dirty` behind it if tracked files differ; None outside of git.

    dvc.lock does not count: DVC changes it after every stage, and it is committed when the study is done. A stage that is run again
    would name another commit, although nothing that it depends on has changed.
    """
    try:
        commit = _git(root, "log", "-1", "--format=%H", "--", ":/", LOCKS) or _git(root, "rev-parse", "HEAD")
        changed = _git(root, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no", "--", ":/", LOCKS)
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
