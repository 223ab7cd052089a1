"""Which study a model's folder belongs to, links included."""

from __future__ import annotations

from pathlib import Path

import pytest

from advml.core.paths import Workspace, canonical, home_of

NAME = "CL-AT-s0"


@pytest.fixture
def study(tmp_path) -> Path:
    root = tmp_path / "study"
    (root / "models" / "finetune" / NAME).mkdir(parents=True)
    return root


def moved(path: Path, to: Path) -> None:
    """Move a folder and put a link in its place."""
    path.rename(to)
    path.symlink_to(to)


@pytest.mark.parametrize("linked", ["models", "models/finetune", f"models/finetune/{NAME}"])
def test_a_model_belongs_to_its_study_although_a_folder_is_a_link_to_another_disk(study, tmp_path, linked):
    moved(study / linked, tmp_path / "elsewhere")
    home, name = home_of(study / "models" / "finetune" / NAME)
    assert (home.root, name) == (study, NAME)


def test_a_link_to_a_model_leads_to_its_study(study, tmp_path):
    (tmp_path / "best").symlink_to(study / "models" / "finetune" / NAME)
    home, name = home_of(tmp_path / "best")
    assert (home.root, name) == (study, NAME)


def test_the_folder_that_one_is_in_has_a_name_too(study, monkeypatch):
    monkeypatch.chdir(study / "models" / "finetune" / NAME)
    home, name = home_of(Path("."))
    assert (home.root, name) == (study, NAME)


@pytest.mark.parametrize("folder", ["/", "/CL-AT-s0", "models/pretrain/CL-at-s0"])
def test_other_folders_belong_to_no_study(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    assert home_of(Path(folder)) is None


def test_a_record_of_evaluate_is_of_a_model_from_elsewhere_unless_the_study_has_such_a_model(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.model("CL-Other-s0").mkdir(parents=True)  # of a regime that params.yaml no longer knows
    for name in ("CL-AT-s0", "CL-Other-s0", "mine"):
        record = workspace.record("evaluate", name)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("{}")
    assert workspace.evaluations_of_given() == {"mine": workspace.record("evaluate", "mine")}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("cl-full-at", "CL-Full-AT-s0"),
        ("SCL-partial-AT-s12", "SCL-Partial-AT-s12"),
        ("CL-AT", "CL-AT-s0"),
        ("CL-at-s0", "CL-at-s0"),  # a pretraining
        ("cl-at-s0", "CL-AT-s0"),
        ("resnet18", "resnet18"),
        ("models/finetune/CL-AT-s0", "models/finetune/CL-AT-s0"),
        ("CL-FAT", "CL-FAT"),
    ],
)
def test_a_model_is_named_in_any_case_and_without_the_seed_0(given, named):
    assert canonical(given) == named
