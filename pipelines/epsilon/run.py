"""Train AT models at other epsilons than the main study's, for claim 6: `python pipelines/epsilon/run.py 0.05 0.3`.

Each epsilon is a study and a DVC repository of its own in eps-<epsilon>/, with the main study's stages, parameters, schemes and
seeds; all are attacked at the main study's epsilon, by threat models I and II alone. Killed, the same command goes on. Then set
similarity.epsilon_studies to pipelines/epsilon/eps-* in params.yaml, and `dvc repro` tests the claim. The report does not watch
these folders: after later changes here, `advml report`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from advml.cli.errors import guarded
from advml.config import dump, load
from advml.core.paths import checked_name

ROOT = Path(__file__).resolve().parents[2]


def study(root: Path, epsilon: str) -> Path:
    """Write the parameters, and link the stages and sources, of the study of one training epsilon; returns its folder.

    Raises:
        UserError: the epsilon is no positive number, or not written as a decimal, which names the folder.
    """
    folder = root / "pipelines" / "epsilon" / checked_name(f"eps-{epsilon}", option="the study")
    main = load(root / "params.yaml")
    overrides = {
        "threat_model.epsilon": epsilon,
        "evaluate.epsilon": repr(main.attacked_epsilon),
        "worst_case.attacks": "[]",
        "similarity.epsilon_studies": "null",
        "grid.standard_regimes": "[]",
        "grid.adversarial_regimes": "[AT]",
        "tracking.experiment": f"{main.tracking.experiment}-eps-{epsilon}",
    }
    text = dump(load(root / "params.yaml", [f"{key}={value}" for key, value in overrides.items()]))
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    (folder / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n", encoding="utf-8"
    )
    for name in ("dvc.yaml", "src", ".dvcignore"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("../../..", name))
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    return folder


def main() -> int:
    """Run the stages up to `represent` of every epsilon's study, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("epsilons", nargs="+", metavar="EPSILON", help="of training, written as decimals, e.g. 0.05 0.3")
    epsilons = parser.parse_args().epsilons
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # stages say `python`: this one
    environment = {**os.environ, "PATH": path, "DVC_ROOT": str(ROOT)}  # images and MLflow's history are the main study's
    for folder in [study(ROOT, epsilon) for epsilon in epsilons]:
        command = [sys.executable, "-m", "dvc", "repro", "represent_at"]
        if code := subprocess.run(command, cwd=folder, env=environment, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    guarded(main)
