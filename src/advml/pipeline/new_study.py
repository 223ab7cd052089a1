"""`advml init`: create the files of a study in an empty folder, for an installed package.

dvc.yaml lists sources under src/advml as dependencies, so that a stage runs again when its code has changed. In a study outside of the
repository, `src/advml` is a link to the installed package: after an upgrade, DVC reruns the affected stages, and dvc.lock has the same
paths and digests on every machine. The link is not committed; `advml init` creates it again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from advml.config.presets import preset
from advml.core.errors import Failure, UserError
from advml.core.io import write_atomically
from advml.core.provenance import PACKAGE, pipeline_file

LINK = Path("src") / "advml"
README = """\
# A study by advml

Settings are in params.yaml; `advml preset {name} --full` explains every key. `dvc repro`, or `advml repro -j 4`, runs outdated stages.
See the results in reports/report.html, or with `advml show CL-Full-AT-s0` and `advml ui`.
In a clone, or in another environment, first run `advml init`: it links src/advml, through which DVC notices new versions of the code.
"""
GIT_IGNORED = """\
# Made by stages, and versioned by DVC
/data/
/models/
/reports/
/records/
# MLflow's and Optuna's histories, scratch files, and the link to the installed package
/mlflow.db*
/mlruns/
/optuna.db*
/.scratch/
/src/
/.venv/
/photos
/attack*.png
"""
DVC_IGNORED = "__pycache__/\n*.pyc\n.scratch/\n.venv/\n"
DVC_SETTINGS = "[core]\n    analytics = false\n    check_update = false\n"


def new_study(root: Path, name: str, *, quick: bool = False, overrides: Sequence[str] = ()) -> list[str]:
    """Write the missing files of a study, without changing existing ones; returns the names of those written.

    Args:
        root: the study's folder, created if missing.
        name, quick: of a preset.
        overrides: `key=value` strings, written into params.yaml.
    Raises:
        UserError: the preset is unknown, the folder contains another pipeline or other sources, or overrides are given for an existing
            params.yaml.
        Failure: git or DVC cannot create a repository here.
    """
    files = {
        "params.yaml": preset(name, quick=quick, overrides=overrides),
        "dvc.yaml": pipeline_file().read_text(encoding="utf-8"),
        ".dvcignore": DVC_IGNORED,
        ".gitignore": GIT_IGNORED,
        "README.md": README.format(name=name),
    }
    if overrides and (root / "params.yaml").exists():
        raise UserError(f"{root / 'params.yaml'} exists already, and -S would change it; edit it, or choose another folder")
    _check(root, files["dvc.yaml"])
    missing = [one for one in files if not (root / one).exists()]
    for one in missing:
        write_atomically(root / one, files[one].encode())
    return [*missing, *_link(root), *_begin_repositories(root)]


def _check(root: Path, pipeline: str) -> None:
    """Raise UserError for a folder that contains another pipeline, or other sources."""
    theirs, sources = root / "dvc.yaml", root / LINK
    if theirs.exists() and "advml" not in theirs.read_text(encoding="utf-8"):
        raise UserError(f"{theirs} is the pipeline of another project; choose an empty folder: advml init digits --folder study")
    if sources.is_dir() and not sources.is_symlink():
        raise UserError(f"{sources} contains sources of advml: its repository already has a study at its root; choose another folder")
    if theirs.exists() and theirs.read_text(encoding="utf-8") != pipeline:
        raise UserError(
            f"{theirs} differs from that of the installed version; compare it with {pipeline_file()}, or move it away and repeat"
        )


def _begin_repositories(root: Path) -> list[str]:
    """Run `git init` and `dvc init`, unless this folder or one above it is such a repository already."""
    begun = []
    if shutil.which("git") and _run(root, "git", "rev-parse", "--git-dir").returncode:
        _must(root, "git", "init", "--quiet")
        begun.append(".git")
    if not (root / ".dvc").is_dir():
        top = _run(root, "git", "rev-parse", "--show-toplevel").stdout.strip() if shutil.which("git") else None
        how = ["--no-scm"] if not top else [] if Path(top).samefile(root) else ["--subdir"]
        _must(root, sys.executable, "-m", "dvc", "init", "--quiet", *how)
        settings = root / ".dvc" / "config"
        settings.write_text((settings.read_text(encoding="utf-8") if "--no-scm" in how else "") + DVC_SETTINGS, encoding="utf-8")
        begun.append(".dvc")
    return begun


def _run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)


def _must(root: Path, *command: str) -> None:
    done = _run(root, *command)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise Failure(f"{Path(command[0]).name} {' '.join(command[1:])} failed in {root}: {said}")


def _link(root: Path) -> list[str]:
    """Link src/advml to the installed package, replacing a link to another environment."""
    link = root / LINK
    if link.is_symlink() and Path(os.path.realpath(link)) == PACKAGE:
        return []
    link.parent.mkdir(exist_ok=True)
    temporary = link.with_name(f".advml.{os.getpid()}")
    temporary.symlink_to(PACKAGE, target_is_directory=True)
    os.replace(temporary, link)
    return [f"{LINK} (a link to {PACKAGE})"]
