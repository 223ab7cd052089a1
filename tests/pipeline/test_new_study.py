"""`advml init`: a study in an empty folder, beside an installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from advml.config import load
from advml.core import provenance
from advml.core.errors import UserError
from advml.pipeline.new_study import LINK, new_study
from advml.pipeline.repro import reasons

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """No repository above the test's folder, and no settings of the machine's user, have a say."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "none"))


def test_a_study_begins_in_an_empty_folder_and_dvc_finds_its_stages(tmp_path):
    root = tmp_path / "study"
    written = new_study(root, "digits", overrides=["seeds=[3]"])
    assert {"params.yaml", "dvc.yaml", ".dvcignore", ".gitignore", "README.md", ".git", ".dvc"} <= set(written)
    assert load(root / "params.yaml").seeds == (3,) and len((root / "README.md").read_text().splitlines()) == 5
    assert (root / "dvc.yaml").read_text() == (REPOSITORY / "dvc.yaml").read_text()
    assert (root / LINK).resolve() == provenance.PACKAGE
    found = reasons(root)
    assert list(found)[:2] == ["check", "prepare"] and found["finetune_at@CL-Full-AT-3"] == ["has not run yet"]
    status = ["git", "status", "--porcelain", "--untracked-files=all"]
    seen = subprocess.run(status, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "src/advml" not in seen and "params.yaml" in seen


def test_a_second_time_nothing_is_written_and_a_lost_link_is_mended(tmp_path):
    new_study(tmp_path / "study", "digits")
    (tmp_path / "study" / "params.yaml").write_text("mine\n")
    assert new_study(tmp_path / "study", "digits") == []
    link = tmp_path / "study" / LINK
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    (mended,) = new_study(tmp_path / "study", "digits")
    assert mended.startswith("src/advml") and link.resolve() == provenance.PACKAGE
    assert (tmp_path / "study" / "params.yaml").read_text() == "mine\n"


@pytest.mark.servers
def test_inside_of_a_repository_the_study_is_a_folder_of_it_and_without_git_it_does_without(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path / "outer"], check=True)
    new_study(tmp_path / "outer" / "study", "smoke")
    assert not (tmp_path / "outer" / "study" / ".git").exists() and (tmp_path / "outer" / "study" / ".dvc" / "config").is_file()
    monkeypatch.setenv("PATH", str(tmp_path))
    new_study(tmp_path / "alone", "smoke")
    assert "no_scm = true" in (tmp_path / "alone" / ".dvc" / "config").read_text().lower()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"dvc.yaml": "stages: {}\n"}, "is the pipeline of another project"),
        ({"dvc.yaml": "# advml\nstages: {}\n"}, "differs from that of the installed version"),
        ({"src/advml/__init__.py": ""}, "contains sources of advml"),
        ({"params.yaml": ""}, "params.yaml exists already"),
    ],
)
def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        new_study(tmp_path, "digits", overrides=["seeds=[1]"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.servers
def test_the_wheel_alone_in_a_fresh_environment_begins_and_runs_a_study(tmp_path):
    """Dependencies come from this environment's packages, advml from the wheel and from nowhere else."""
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", tmp_path, REPOSITORY], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, wheel], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    (python.parent / "dvc").write_text(f"#!{python}\nimport sys\nfrom dvc.cli import main\nsys.exit(main())\n")
    (python.parent / "dvc").chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    study = tmp_path / "study"
    study.mkdir()

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=study, env=environment, capture_output=True, text=True, check=True).stdout

    tiny = ("grid.schemes=[SL]", "grid.adversarial_regimes=[]", "pretrain.SL.epochs=1", "regimes.ST.epochs=1", "data.max_train=200")
    tiny += ("data.max_test=60", "corruptions.names=[fog]", "worst_case.queries=20", "worst_case.steps=3", "diagnostics.images=20")
    assert f"src/advml (a link to {site}/advml)" in run("advml", "init", "digits", *(part for one in tiny for part in ("-S", one)))
    run("dvc", "repro")
    assert (study / "reports" / "report.html").is_file() and "SL-ST-s0" in (study / "reports" / "summary.csv").read_text()
    assert "accuracy on test" in run("advml", "show", "sl-st")
    assert run("advml", "repro", "--dry-run") == "everything is up to date\n"
    with (site / "advml" / "attacks" / "pgd.py").open("a") as source:  # as an upgrade does
        source.write("# another version\n")
    assert "pretrain_st@SL-0" in run("advml", "repro", "--dry-run")
