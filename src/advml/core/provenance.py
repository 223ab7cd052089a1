"""Origin of a result: git commit, DVC stage, and digests of sources and initial weights, which decide whether work is resumed."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advml.core.errors import UserError
from advml.core.io import sha256
from advml.core.paths import given_path

PACKAGE = Path(__file__).resolve().parents[1]  # resolved, because `src` may be a link
LOCKS = ":(exclude,top,glob)**/dvc.lock"


@functools.cache
def git_commit(root: Path) -> str | None:
    """Last commit at `root` that changed more than dvc.lock, with suffix `-dirty` if tracked files differ; None outside of git.

    dvc.lock is ignored because DVC changes it after every stage, and it is committed when the study is done: a repeated stage would
    name another commit although none of its inputs has changed.
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
    """Name of the stage that DVC runs in this process, e.g. `finetune_at@CL-AT-0`; None without DVC."""
    return os.environ.get("DVC_STAGE") or None


@functools.cache
def source_digest(stage: str | None = None) -> str:
    """sha256 of source files: of the whole package, or of those under `deps` of a kind of stage in dvc.yaml, e.g. `finetune`.

    When these change, the stage is neither resumed nor its result reused, so that advml and DVC agree on what is up to date.
    """
    listed = _sources(stage) if stage else [PACKAGE]
    files = {file for path in listed for file in (path.rglob("*") if path.is_dir() else [path])}
    kept = sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."))
    parts = (hashlib.sha256(file.read_bytes()).hexdigest() + file.relative_to(PACKAGE).as_posix() for file in kept)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def init_digest(init: str) -> str:
    """sha256 of the present weights of `model.init`, a model's folder or a file."""
    path = given_path(init)
    try:
        return sha256(path / "model.safetensors" if path.is_dir() else path)
    except OSError as error:
        raise UserError(f"model.init = {init} cannot be read: {error.strerror}; give a model's folder or a safetensors file") from None


def check_init(init: str | None, pretrained: Mapping[str, Any]) -> None:
    """Check that the weights of `model.init` are still those that a pretraining has started from (DVC compares only the path).

    Args:
        init: the value of `model.init`.
        pretrained: model.json of the pretraining.
    Raises:
        UserError: the weights have changed.
    """
    if init and (now := init_digest(init)) != (then := pretrained.get("init", {}).get("digest")):
        scheme, phase, seed = (pretrained[key] for key in ("scheme", "phase", "seed"))
        raise UserError(
            f"model.init = {init} holds other weights ({now[:16]}) than {pretrained['name']} has started from ({str(then)[:16]}); "
            f"make it again: dvc repro -s -f pretrain_{phase}@{scheme}-{seed}, or: advml pretrain {scheme} {phase} --seed {seed}"
        )


def check_data(folder: Path, record: Mapping[str, Any], *, prepared: Path, here: str) -> None:
    """Check that a model was trained on the prepared data; else its training images may be among the present test images.

    Args:
        record: its model.json.
        prepared: folder of the prepared data, for the message.
        here: digest of the prepared data.
    Raises:
        UserError: it was trained on other data, or imported.
    """
    if (there := record.get("data", {}).get("digest")) == here:
        return
    if "scheme" not in record:
        raise UserError(f"{folder} was not trained on the data in {prepared}; choose a model that advml has trained on them")
    again = f"pretrain {record['scheme']} {record['phase']}" if "phase" in record else f"train {record['scheme']} {record['regime']}"
    raise UserError(
        f"{folder} was trained on other data ({str(there)[:16]}) than those in {prepared} ({here[:16]}); "
        f"run: dvc repro, or: advml {again} --seed {record['seed']}"
    )


def pipeline_file() -> Path:
    """Path of the dvc.yaml that belongs to these sources: inside the package in a wheel, at the root in a checkout."""
    installed = PACKAGE / "dvc.yaml"
    return installed if installed.exists() else PACKAGE.parents[1] / "dvc.yaml"


def _sources(stage: str) -> list[Path]:
    """Source files and folders under `deps` of a kind of stage (the same for its _st and _at variants); all if dvc.yaml lacks it."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        stages = YAML(typ="safe").load(pipeline_file())["stages"]
        deps = stages[stage if stage in stages else f"{stage}_st"]["deps"]
    except (OSError, YAMLError, KeyError, TypeError):
        return [PACKAGE]
    return [PACKAGE / path.removeprefix("src/advml/") for path in deps if path.startswith("src/advml/")]
