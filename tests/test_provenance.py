"""The commit in a model's record: the sources that made it, whatever DVC writes beside them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from advml.provenance import git_commit


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def told(root: Path) -> str | None:
    return git_commit.__wrapped__(root)


@pytest.fixture
def committed(tmp_path) -> Path:
    """A repository with a pipeline in its root and another one in a folder, as they are after a run."""
    for name in ("dvc.yaml", "dvc.lock", "source.py", "pipelines/small/dvc.yaml", "pipelines/small/dvc.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "start")
    return tmp_path


@pytest.mark.parametrize("folder", ["", "pipelines/small"])
def test_a_lock_that_dvc_has_written_since_does_not_make_the_sources_dirty(committed, folder):
    commit = git(committed, "rev-parse", "HEAD")
    for name in ("dvc.lock", "pipelines/small/dvc.lock"):
        (committed / name).write_text("2")
    (committed / "untracked").write_text("1")
    assert told(committed / folder) == commit
    (committed / "source.py").write_text("2")
    assert told(committed / folder) == f"{commit}-dirty"


def test_without_git_there_is_no_commit_and_no_word(tmp_path, capfd, monkeypatch):
    assert told(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # nor without the program
    assert told(tmp_path) is None
    assert capfd.readouterr() == ("", "")
