"""The notebooks run, are small, and are stored without results; `make docs` runs them in a kernel, for the site."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
SAID = {  # what a reader is promised to see
    "attack_a_model": ["clean", "epsilon  0.4", "PGD, L2"],
    "is_my_model_robust": ["accuracy/worst_case", "! "],
    "what_training_did_to_the_layers": ["Full-AT", "encoder.", "attacked"],
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_its_text_speaks_of(path, tmp_path, monkeypatch, capsys):
    """In this process, cell by cell, as a kernel does: the last expression of a cell is shown."""
    monkeypatch.chdir(tmp_path)
    content, names = json.loads(path.read_text(encoding="utf-8")), {}
    for number, cell in enumerate(cell for cell in content["cells"] if cell["cell_type"] == "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, f"{path} holds results; clear them"
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name} cell {number}", "exec"), names)
        if last:
            shown = eval(compile(ast.Expression(last.value), f"{path.name} cell {number}", "eval"), names)
            print("PNG" if hasattr(shown, "_repr_png_") and shown._repr_png_().startswith(b"\x89PNG") else shown)
    said = capsys.readouterr().out
    assert all(words in said for words in SAID[path.stem])
    assert path.stat().st_size < 8000 and not list(tmp_path.iterdir())


@pytest.mark.servers
def test_the_site_is_built_with_the_notebooks_results_and_a_search_and_asks_no_other_host(tmp_path):
    environment = {**os.environ, "PYTHONPATH": "", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", tmp_path / "site"]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    with contextlib.chdir(tmp_path / "site"):
        reference, notebook = Path("reference.html").read_text(), Path("notebooks/is_my_model_robust.html").read_text()
        assert all(f'id="advml.{name}"' in reference for name in ("attack", "evaluate", "compare_layers", "probe_layers", "train"))
        assert "accuracy/worst_case" in notebook and Path("search.html").is_file() and Path("searchindex.js").is_file()
        pages = "".join(path.read_text() for path in Path().glob("*.html"))
        assert 'src="http' not in pages and 'rel="stylesheet" href="http' not in pages
