"""`advml doctor`: list installed versions, device and stores, and find problems."""

from __future__ import annotations

import configparser
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from advml import __version__, config
from advml.config.store import locate
from advml.core.errors import UserError
from advml.core.passwords import masked
from advml.core.provenance import PACKAGE, git_commit
from advml.pipeline.new_study import LINK

LIBRARIES = ("torch", "torchvision", "timm", "mlflow", "dvc", "optuna", "pyautoattack")
OPTIONAL = {"foolbox": "distances", "psycopg": "server", "boto3": "server"}  # library -> the extra that installs it
LEAST_FREE = 1.0  # GB on the study's disk, below which doctor reports a problem


def examine(params: Path) -> dict[str, Any]:
    """Examine this environment and study.

    Returns:
        Sections `installed`, `device` and `stores` (name -> text), and `wrong`: one line per problem, with its remedy.
    """
    wrong: list[str] = []
    return {"installed": _installed(wrong), "device": _device(wrong), "stores": _stores(params, wrong), "wrong": wrong}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _installed(wrong: list[str]) -> dict[str, str]:
    found = {"advml": f"{__version__} ({PACKAGE})", "python": f"{platform.python_version()} ({sys.executable})"}
    for library in LIBRARIES:
        found[library] = _version(library) or "missing"
        if found[library] == "missing":
            wrong.append(f"{library} is not installed; install advml again into this environment")
    for library, extra in OPTIONAL.items():
        found[library] = _version(library) or f'not installed (only for pip install "advml[{extra}]")'
    for program in ("git", "dvc", "advml"):
        where = shutil.which(program)
        found[f"{program} on PATH"] = where or "none"
        if where is None:
            wrong.append(f"{program} is not on PATH; {'install it' if program == 'git' else 'activate the environment of advml'}")
        elif program != "git" and Path(where).parent.resolve() != Path(sys.executable).parent.resolve():
            wrong.append(f"{program} on PATH is {where}, from another environment than {sys.executable}; activate one of them")
    return found


def _device(wrong: list[str]) -> dict[str, str]:
    found = {"processor": f"{os.cpu_count()} cores, {platform.machine()}"}
    try:
        import torch
        import torchvision  # noqa: F401 - its import fails if it does not match torch
    except Exception as error:  # a broken installation may raise anything
        wrong.append(f"torch or torchvision cannot be imported ({' '.join(str(error).split())[:200]}); install both again, from one index")
        return found | {"device": "none"}
    found |= {"threads": str(torch.get_num_threads()), "built for CUDA": torch.version.cuda or "no"}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            found[f"cuda:{number}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
        return found | {"device": "cuda (runtime.device: auto)"}
    if Path("/dev/nvidiactl").exists():
        wrong.append("there is an NVIDIA GPU, but torch cannot use it; install a build of torch for its driver (see nvidia-smi)")
    mps = " (runtime.device: auto; mps is available)" if torch.backends.mps.is_available() else " (runtime.device: auto)"
    return found | {"device": f"cpu{mps}"}


def _stores(params: Path, wrong: list[str]) -> dict[str, str]:
    root = params.parent
    free = shutil.disk_usage(root if root.is_dir() else Path()).free / 1e9
    found = {"study": str(root.resolve()), "free disk": f"{free:.1f} GB", "git commit": git_commit(root) or "none"}
    if free < LEAST_FREE:
        wrong.append(f"only {free:.1f} GB are free at {root.resolve()}; free disk space before training")
    link = root / LINK
    if link.is_symlink() and Path(os.path.realpath(link)) != PACKAGE:
        wrong.append(f"{link} does not link to the installed package; repair it with: advml init")
    if not (root / "dvc.yaml").exists():
        found["pipeline"] = "none (create a study here with: advml init digits)"
    found["DVC remotes"] = _remotes(root, wrong)
    try:
        chosen = config.load(params)
        place = locate(chosen.tracking, root=root)
    except UserError as error:
        return found | {"params.yaml": "none" if not params.exists() else _noted(wrong, str(error))}
    if place.refused:
        wrong.append(place.refused)
    return found | {
        "params.yaml": "valid",
        "MLflow": masked(place.uri),
        "searches": "optuna.db" if (root / "optuna.db").exists() else "none",
    }


def _noted(wrong: list[str], line: str) -> str:
    wrong.append(line)
    return "invalid"


def _remotes(root: Path, wrong: list[str]) -> str:
    """DVC remotes in .dvc/config and .dvc/config.local, with passwords masked."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([root / ".dvc" / "config", root / ".dvc" / "config.local"], encoding="utf-8")
    except configparser.Error as error:
        return _noted(wrong, f"{root / '.dvc' / 'config'} cannot be read ({' '.join(str(error).split())}); correct it")
    named = {section.split('"')[1]: parser[section].get("url", "") for section in parser.sections() if '"' in section}
    return ", ".join(f"{name} ({masked(url)})" for name, url in named.items()) or "none"
