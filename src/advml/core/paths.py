"""Paths of a study's files, and names of its models, as used in paths, stages, MLflow runs and tables."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from advml.core.errors import UserError
from advml.recipes import PhaseName, RegimeName, SchemeName


def pretraining_name(scheme: str, phase: str, seed: int) -> str:
    """Name of a pretraining, e.g. `CL-at-s0`: scheme CL, adversarial, seed 0."""
    return f"{scheme}-{phase}-s{seed}"


def model_name(scheme: str, regime: str, seed: int) -> str:
    """`CL-Full-AT-s0`."""
    return f"{scheme}-{regime}-s{seed}"


def canonical(model: str) -> str:
    """Complete the name of a study's model, written in any case: `cl-full-at` -> `CL-Full-AT-s0` (the default seed is 0).

    Other text, such as the name of a pretraining (`CL-at-s0`), is returned unchanged.
    """
    regimes = "|".join(sorted(get_args(RegimeName), key=len, reverse=True))
    parts = re.fullmatch(rf"({'|'.join(get_args(SchemeName))})-({regimes})(?:-s(\d+))?", model, flags=re.IGNORECASE)
    if not parts or re.fullmatch(rf"[^a-z]+-({'|'.join(get_args(PhaseName))})-s\d+", model):
        return model
    known = {name.lower(): name for name in (*get_args(SchemeName), *get_args(RegimeName))}
    scheme, regime = (known[part.lower()] for part in parts.groups()[:2])
    return model_name(scheme, regime, int(parts[3] or 0))


def checked_name(name: str, *, option: str = "--name") -> str:
    """Check a name that becomes part of a path, and return it.

    Raises:
        UserError: the name has characters other than letters, digits, `_`, `.` and `-`, or does not begin with a letter or digit.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, flags=re.ASCII):
        raise UserError(f"{option} {name!r} is not valid; use letters, digits, '_', '.' and '-', beginning with a letter or digit")
    return name


# Names in reports/, beside a folder per model: files of `report`, folders of other commands.
REPORT_FILES = ("summary.md", "summary.csv", "summary.png", "claims.json", "report.html")
DVC_FILES = ("results.json", "training.csv", "cka.png")  # written by `report` for `dvc metrics` and `dvc plots`
TRANSFER_FILES = ("transfer.json", "transfer.csv", "transfer.png")  # in reports/transfer/
SEARCH_FILES = ("best.yaml", "trials.csv")  # in reports/tune/NAME/
FOLDERS = ("compare", "transfer", "tune")


OF_THE_STUDY = re.compile(rf"({'|'.join(get_args(SchemeName))})-({'|'.join((*get_args(RegimeName), *get_args(PhaseName)))})-s\d+")


def is_reserved(name: str) -> bool:
    """Whether a name is reserved, so that an external model must not use it: for models and pretrainings of the study, or in `reports/`.

    Compared in lower case, because some file systems ignore case.
    """
    return (
        bool(OF_THE_STUDY.fullmatch(name)) or name.lower() in (*REPORT_FILES, *DVC_FILES, *FOLDERS) or name.lower().startswith("compare-")
    )


@dataclass(frozen=True)
class Workspace:
    """Folders of one study; params.yaml and dvc.yaml are in `root`."""

    root: Path = Path()

    @property
    def prepared(self) -> Path:
        return self.root / "data" / "prepared"

    @property
    def checked(self) -> Path:
        return self.root / "data" / "checked"

    @property
    def written(self) -> tuple[Path, ...]:
        """Folders that the stages write, where users must not put images."""
        return (*(self.root / name for name in ("models", "reports", "records", ".scratch", "data/adversarial")), self.prepared)

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def models(self) -> Path:
        return self.root / "models" / "finetune"

    def pretrained(self, name: str) -> Path:
        return self.root / "models" / "pretrain" / name

    def model(self, name: str) -> Path:
        return self.models / name

    def imported(self, name: str) -> Path:
        return self.root / "models" / "imported" / name

    def exported(self, name: str) -> Path:
        return self.root / "models" / "exported" / name

    def report(self, name: str) -> Path:
        return self.reports / name

    def adversarial(self, name: str) -> Path:
        """File of a model's adversarial test images."""
        return self.root / "data" / "adversarial" / f"{name}.safetensors"

    def samples(self, name: str) -> Path:
        """File of an evaluation's results per test image."""
        return self.report(name) / "samples.parquet"

    def record(self, stage: str, name: str) -> Path:
        """File that records how a stage measured its figures: settings, counts, seeds. The report depends on its folder."""
        return self.root / "records" / stage / f"{name}.json"

    def older_evaluations(self, name: str) -> tuple[Path, ...]:
        """Files in which older versions kept the evaluation record of an external model, newest version last."""
        return self.report(name) / "evaluation.json", self.record("given", name)

    def evaluations_of_given(self) -> dict[str, Path]:
        """Evaluation records of models outside of the study, by name; of older versions only if there is no newer one."""
        older = {path.parent.name: path for path in sorted(self.reports.glob("*/evaluation.json"))}
        older |= {path.stem: path for path in sorted(self.record("given", "").parent.glob("*.json"))}
        found = {path.stem: path for path in sorted(self.record("evaluate", "").parent.glob("*.json"))}
        # The second condition: models of regimes that were removed.
        trained = {name for name in found if OF_THE_STUDY.fullmatch(name) or self.model(name).exists()}
        return older | {name: path for name, path in found.items() if name not in trained}

    @property
    def verified(self) -> Path:
        """File that lists the files of `prepared` whose digests were verified."""
        return self.scratch("prepare") / "verified.json"

    def scratch(self, stage: str) -> Path:
        """Folder for the state of an unfinished stage, e.g. `pretrain-CL-at-s0`, which DVC does not track."""
        return self.root / ".scratch" / stage


def find_model(workspace: Workspace, model: str) -> Path:
    """Folder of a model (or pretrained encoder) that advml has trained or imported, given by name (CL-Full-AT-s0) or by folder.

    Raises:
        UserError: there is no such model; lists those that exist.
    """
    for folder in (
        Path(model),
        workspace.model(model),
        workspace.pretrained(model),
        workspace.imported(model),
        workspace.model(canonical(model)),
    ):
        if (folder / "model.json").is_file():
            return folder
    names = sorted(path.parent.name for path in workspace.models.glob("[!.]*/model.json"))
    near = [] if canonical(model) != model else difflib.get_close_matches(model, names, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    choices = f"{meant}choose from {', '.join(names)}" if names else "train one with: advml train CL Full-AT"
    elsewhere = model in workspace.evaluations_of_given()
    only = " trained or imported by advml (give an external model in the form that `advml evaluate` accepts)" if elsewhere else ""
    raise UserError(f"there is no model {model!r}{only}; {choices}")


def home_of(folder: Path) -> tuple[Workspace, str] | None:
    """Study whose `models/finetune/` contains this folder (links resolved), and the model's name there; None: no study does."""
    for path in (Path(os.path.abspath(folder)), folder.resolve()):
        if path.parts[-3:-1] == ("models", "finetune"):
            return Workspace(path.parents[2]), path.name
    return None


def given_path(path: str) -> Path:
    """Resolve a path of params.yaml; a relative one that does not exist here starts at DVC_ROOT.

    DVC's queue workers run in a copy of the study without untracked data.

    Raises:
        UserError: it begins with the home folder of a user that does not exist.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"'{path}' names the home folder of an unknown user; write the folder out, or begin with ./~") from None
    root = os.environ.get("DVC_ROOT")
    return given if root is None or os.path.exists(given) else Path(root) / given
