"""`advml doctor`: what is there, and a line for each fault."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from advml.pipeline import doctor
from advml.pipeline.new_study import LINK


@pytest.fixture(autouse=True)
def activated(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda program: f"{Path(sys.executable).parent}/{program}")


def test_a_sound_study_has_no_fault_and_passwords_stay_hidden(study):
    (study.root / ".dvc").mkdir()
    (study.root / ".dvc" / "config").write_text("['remote \"store\"']\n    url = https://ann:secret@host/x\n")
    found = doctor.examine(study.params)
    assert found["wrong"] == [] and found["stores"]["params.yaml"] == "valid"
    assert found["stores"]["MLflow"].startswith("sqlite:///") and found["stores"]["DVC remotes"].startswith("store (https://")
    assert "secret" not in str(found)
    assert found["installed"]["torch"] != "missing" and found["device"]["device"].split()[0] in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda root, monkeypatch: (root / "params.yaml").write_text("seeds: [0, 0]\n"), "params.yaml"),
        (lambda root, monkeypatch: monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns"), "migrate-filestore"),
        (lambda root, monkeypatch: monkeypatch.setattr(doctor.shutil, "which", lambda name: None), "git is not on PATH"),
        (
            lambda root, monkeypatch: monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/other/bin/{name}"),
            "from another environment",
        ),
        (
            lambda root, monkeypatch: monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library")),
            "no-such-library is not installed",
        ),
        (lambda root, monkeypatch: (root / "src").mkdir() or (root / LINK).symlink_to(root / "gone"), "repair it with: advml init"),
        (lambda root, monkeypatch: monkeypatch.setattr(doctor, "LEAST_FREE", 1e9), "GB are free"),
        (lambda root, monkeypatch: monkeypatch.setitem(sys.modules, "torchvision", None), "torch or torchvision cannot be imported"),
    ],
)
def test_each_fault_is_a_line_that_names_it(study, monkeypatch, break_it, words):
    break_it(study.root, monkeypatch)
    lines = doctor.examine(study.params)["wrong"]
    assert any(words in line for line in lines) and all("\n" not in line for line in lines), lines
