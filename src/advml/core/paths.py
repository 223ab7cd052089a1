"""Where everything lies. Names are the contract: the same in paths, stages, MLflow runs and tables."""

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
    """`CL-at-s0`: the contrastive scheme, adversarially pretrained, seed 0."""
    return f"{scheme}-{phase}-s{seed}"


def model_name(scheme: str, regime: str, seed: int) -> str:
    """`CL-Full-AT-s0`."""
    return f"{scheme}-{regime}-s{seed}"


def canonical(model: str) -> str:
    """`cl-full-at` -> `CL-Full-AT-s0`: a study's model in any case, of seed 0 where none is named; anything else, also the name of a
    pretraining (`CL-at-s0`), stays as it is.
    """
    regimes = "|".join(sorted(get_args(RegimeName), key=len, reverse=True))
    parts = re.fullmatch(rf"({'|'.join(get_args(SchemeName))})-({regimes})(?:-s(\d+))?", model, flags=re.IGNORECASE)
    if not parts or re.fullmatch(rf"[^a-z]+-({'|'.join(get_args(PhaseName))})-s\d+", model):
        return model
    known = {name.lower(): name for name in (*get_args(SchemeName), *get_args(RegimeName))}
    scheme, regime = (known[part.lower()] for part in parts.groups()[:2])
    return model_name(scheme, regime, int(parts[3] or 0))


def checked_name(name: str, *, option: str = "--name") -> str:
    """The name, which is to be part of a path and so must not lead out of its folder.

    Raises:
        UserError: it is not made of letters, digits, `_`, `.` and `-`, the first one a letter or digit.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, flags=re.ASCII):
        raise UserError(f"{option} {name!r} is no name; use letters, digits, '_', '.' and '-', beginning with a letter or digit")
    return name


# What lies in reports/ beside a folder per model: files of `report`, folders of other commands.
REPORT_FILES = ("summary.md", "summary.csv", "summary.png", "claims.json", "report.html")
TRANSFER_FILES = ("transfer.json", "transfer.csv", "transfer.png")  # in reports/transfer/
SEARCH_FILES = ("best.yaml", "trials.csv")  # in reports/tune/NAME/
FOLDERS = ("compare", "transfer", "tune")


OF_THE_STUDY = re.compile(rf"({'|'.join(get_args(SchemeName))})-({'|'.join((*get_args(RegimeName), *get_args(PhaseName)))})-s\d+")


def is_reserved(name: str) -> bool:
    """Whether a model from elsewhere may not have this name: it is one of the study's models and pretrainings, or something else has it in
    `reports/`; in lower case, as some disks see no difference."""
    return bool(OF_THE_STUDY.fullmatch(name)) or name.lower() in (*REPORT_FILES, *FOLDERS) or name.lower().startswith("compare-")


@dataclass(frozen=True)
class Workspace:
    """The folder tree of one study; `root` is where params.yaml and dvc.yaml lie."""

    root: Path = Path()

    @property
    def prepared(self) -> Path:
        return self.root / "data" / "prepared"

    @property
    def checked(self) -> Path:
        return self.root / "data" / "checked"

    @property
    def written(self) -> tuple[Path, ...]:
        """Folders that the stages write, none of which is a place for a user's images."""
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

    def report(self, name: str) -> Path:
        return self.reports / name

    def adversarial(self, name: str) -> Path:
        """The adversarial test images of a model."""
        return self.root / "data" / "adversarial" / f"{name}.safetensors"

    def samples(self, name: str) -> Path:
        """What an evaluation saw of every test image."""
        return self.report(name) / "samples.parquet"

    def record(self, stage: str, name: str) -> Path:
        """How a stage made its figures: settings, counts, seeds. The report depends on this folder."""
        return self.root / "records" / stage / f"{name}.json"

    def older_evaluations(self, name: str) -> tuple[Path, ...]:
        """Where older versions kept the record of a model from elsewhere, the newest last."""
        return self.report(name) / "evaluation.json", self.record("given", name)

    def evaluations_of_given(self) -> dict[str, Path]:
        """The records of `evaluate` of models that are not of the study, by name; of an older version where there is no newer one."""
        older = {path.parent.name: path for path in sorted(self.reports.glob("*/evaluation.json"))}
        older |= {path.stem: path for path in sorted(self.record("given", "").parent.glob("*.json"))}
        found = {path.stem: path for path in sorted(self.record("evaluate", "").parent.glob("*.json"))}
        trained = {name for name in found if OF_THE_STUDY.fullmatch(name) or self.model(name).exists()}  # the latter: of an earlier regime
        return older | {name: path for name, path in found.items() if name not in trained}

    @property
    def verified(self) -> Path:
        """Which files of `prepared` have been found to have their digest."""
        return self.scratch("prepare") / "verified.json"

    def scratch(self, stage: str) -> Path:
        """State of an unfinished stage, outside of DVC; `stage` is e.g. `pretrain-CL-at-s0`."""
        return self.root / ".scratch" / stage


def find_model(workspace: Workspace, model: str) -> Path:
    """The folder of a model that advml has trained, given by name (CL-Full-AT-s0) or by folder; pretrained encoders count too.

    Raises:
        UserError: naming the models that exist.
    """
    for folder in (Path(model), workspace.model(model), workspace.pretrained(model), workspace.model(canonical(model))):
        if (folder / "model.json").is_file():
            return folder
    names = sorted(path.parent.name for path in workspace.models.glob("[!.]*/model.json"))
    near = [] if canonical(model) != model else difflib.get_close_matches(model, names, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    choices = f"{meant}choose from {', '.join(names)}" if names else "train one with: advml train CL Full-AT"
    elsewhere = ":" in model or model in workspace.evaluations_of_given()
    only = " that advml has trained (models from elsewhere are for advml evaluate alone)" if elsewhere else ""
    raise UserError(f"there is no model {model!r}{only}; {choices}")


def home_of(folder: Path) -> tuple[Workspace, str] | None:
    """The study whose `models/finetune/` holds this folder, and its name there, also through links; None: no study does."""
    for path in (Path(os.path.abspath(folder)), folder.resolve()):
        if path.parts[-3:-1] == ("models", "finetune"):
            return Workspace(path.parents[2]), path.name
    return None


def given_path(path: str) -> Path:
    """A path of params.yaml. A relative one that is not here starts at DVC_ROOT: a queue worker runs in a copy, without untracked data.

    Raises:
        UserError: it begins with the home folder of a user that does not exist.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"'{path}' names the home folder of an unknown user; write the folder out, or begin with ./~") from None
    root = os.environ.get("DVC_ROOT")
    return given if root is None or os.path.exists(given) else Path(root) / given
