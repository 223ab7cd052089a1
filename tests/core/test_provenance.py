"""Which commit a result names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from advml.core.provenance import git_commit


def git(folder: Path, *arguments: str) -> str:
    told = subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return told.stdout.strip()


@pytest.fixture
def repository(tmp_path) -> Path:
    git(tmp_path, "init", "-q")
    for name in ("params.yaml", "dvc.lock", "pipelines/smoke/dvc.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "start")
    return tmp_path


def named(folder: Path) -> str | None:
    git_commit.cache_clear()
    return git_commit(folder)


def test_a_result_names_the_commit_and_whether_tracked_files_differ_from_it(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert named(repository) == named(repository / "pipelines" / "smoke") == commit
    (repository / "params.yaml").write_text("after")
    assert named(repository) == named(repository / "pipelines" / "smoke") == f"{commit}-dirty"
    git(repository, "commit", "-q", "-a", "-m", "other parameters")
    assert named(repository) == git(repository, "rev-parse", "HEAD") != commit


@pytest.mark.parametrize("lock", ["dvc.lock", "pipelines/smoke/dvc.lock"])
def test_a_lock_that_dvc_writes_and_the_user_commits_changes_nothing(repository, lock):
    """DVC writes it after every stage; a study that is run again after the commit has the same outputs."""
    commit = git(repository, "rev-parse", "HEAD")
    (repository / lock).write_text("after")
    assert named(repository) == commit
    git(repository, "commit", "-q", "-a", "-m", "the study's results")
    assert git(repository, "rev-parse", "HEAD") != commit and named(repository) == commit


def test_outside_of_git_and_before_the_first_commit_there_is_none_and_no_message(tmp_path, capfd, monkeypatch):
    assert named(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert named(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # nor without the program
    assert named(tmp_path) is None
    assert capfd.readouterr() == ("", "")
