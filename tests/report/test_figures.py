"""The page's figures show the numbers of the files, of the right matrix, kind and model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from advml import config as configuration
from advml.core.errors import UserError
from advml.core.paths import Workspace
from advml.figures.style import regime_colours
from advml.report import figures
from advml.similarity.represent import MATRICES, to_npz

REPOSITORY = Path(__file__).parents[2]
GRID = configuration.load(REPOSITORY / "params.yaml").grid
NAMES = ("encoder.conv1", "encoder.layer1", "classifier")


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def number(model: str, what: str) -> float:
    """Another one for every model and quantity."""
    return int(hashlib.sha256(f"{model} {what}".encode()).hexdigest()[:6], 16) / 16**6


def plant(workspace: Workspace, model: str) -> None:
    folder = workspace.report(model)
    arrays = {name: np.full((3, 3), number(model, name)) + np.diag([0, 0.1, 0.2]) for name in MATRICES}
    probes = {kind: number(model, f"probe {kind}") for kind in ("clean", "adversarial", "validation")}
    write(folder / "cka.json", {"layers": [{"name": name, "probe": {"accuracy": probes}} for name in NAMES]})
    (folder / "cka.npz").write_bytes(to_npz(arrays))
    digest = hashlib.sha256((folder / "cka.npz").read_bytes()).hexdigest()
    write(workspace.record("represent", model), {"model": model, "digest": model, "cka": digest, "metrics": {}})
    write(workspace.model(model) / "model.json", {"digest": model})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    found = Workspace(tmp_path)
    for model in ("SL-ST-s0", "SL-AT-s0", "CL-AT-s0", "CL-Full-AT-s0"):
        plant(found, model)
    return found


@pytest.mark.parametrize("name", MATRICES)
def test_heatmaps_show_the_matrix_that_they_are_asked_for(workspace, name):
    drawn = {}
    for axes in figures.matrices(GRID, workspace, name, seed=0).axes:
        if axes.get_images() and axes.get_title(loc="left"):
            drawn[axes.get_title(loc="left")] = np.asarray(axes.get_images()[0].get_array())
    assert drawn.keys() == {"SL ST", "SL AT", "CL AT", "CL Full-AT"}
    for title, matrix in drawn.items():
        np.testing.assert_allclose(matrix, number(f"{title.replace(' ', '-')}-s0", name) + np.diag([0, 0.1, 0.2]))


def test_curves_are_the_diagonal_and_the_probes_in_the_regimes_colours(workspace):
    axes = figures.curves(GRID, workspace, seed=0).axes
    assert [axes[row * 3].get_ylabel() for row in range(2)] == ["SL", "CL"]
    for row, scheme in enumerate(("SL", "CL")):
        for column, quantity in enumerate(("clean_adversarial", "probe clean", "probe adversarial")):
            for line in axes[3 * row + column].get_lines():
                model, scale = f"{scheme}-{line.get_label()}-s0", 1 if column == 0 else 100
                expected = number(model, quantity) + np.array([0, 0.1, 0.2]) * (column == 0)
                np.testing.assert_allclose(line.get_ydata(), scale * expected)
                assert line.get_color() == regime_colours([])[line.get_label()]


def test_without_measurements_there_is_no_figure(tmp_path):
    assert figures.matrices(GRID, Workspace(tmp_path), "clean", seed=0) is None
    assert figures.curves(GRID, Workspace(tmp_path), seed=0) is None


def test_a_model_that_was_trained_anew_is_not_shown(workspace):
    write(workspace.model("SL-ST-s0") / "model.json", {"digest": "new weights"})
    titles = {axes.get_title(loc="left") for axes in figures.matrices(GRID, workspace, "clean", seed=0).axes if axes.get_images()}
    assert "SL ST" not in titles and "SL AT" in titles


@pytest.mark.parametrize("fault", [b"damaged", None])
def test_files_that_are_not_the_records_are_one_line(workspace, fault):
    path = workspace.report("SL-AT-s0") / "cka.npz"
    path.unlink() if fault is None else path.write_bytes(fault)
    with pytest.raises(UserError, match=r"cka\.npz") as refused:
        figures.matrices(GRID, workspace, "clean", seed=0)
    assert "measure again" in str(refused.value) and "\n" not in str(refused.value)
