"""What made a result: the git commit and the DVC stage for people, a digest of a stage's sources for resuming."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # also where `src` is a link: one dvc.yaml lists the sources
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
def source_digest(stage: str | None = None) -> str:
    """sha256 over sources: of the package, or of what dvc.yaml lists under the `deps` of a kind of stage, e.g. `finetune`.

    A stage is not resumed, and its result not taken as it is, after these have changed: DVC and the stage itself agree on what is
    up to date.
    """
    listed = _sources(stage) if stage else [PACKAGE]
    files = {file for path in listed for file in (path.rglob("*") if path.is_dir() else [path])}
    kept = sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."))
    parts = (hashlib.sha256(file.read_bytes()).hexdigest() + file.relative_to(PACKAGE).as_posix() for file in kept)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def pipeline_file() -> Path:
    """The dvc.yaml of these sources: that of a wheel is in the package, that of a checkout at its root."""
    installed = PACKAGE / "dvc.yaml"
    return installed if installed.exists() else PACKAGE.parents[1] / "dvc.yaml"


def _sources(stage: str) -> list[Path]:
    """Files and folders of the package under the `deps` of a kind of stage; all, where dvc.yaml lacks it. Both of a pair have the same."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        stages = YAML(typ="safe").load(pipeline_file())["stages"]
        deps = stages[stage if stage in stages else f"{stage}_st"]["deps"]
    except (OSError, YAMLError, KeyError, TypeError):
        return [PACKAGE]
    return [PACKAGE / path.removeprefix("src/advml/") for path in deps if path.startswith("src/advml/")]
