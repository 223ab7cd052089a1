"""The main study and those beside it, which differ in the training epsilon alone."""

from __future__ import annotations

import glob
import math
from dataclasses import dataclass
from pathlib import Path

from advml import config
from advml.claims.evidence import REMEDY
from advml.claims.hypotheses import SCHEMES
from advml.core.io import read_json
from advml.paths import Workspace, model_name, pretraining_name


@dataclass(frozen=True)
class Found:
    """A study and the epsilon that its AT models were trained at. `beside`: that epsilon, None for the main study."""

    workspace: Workspace
    epsilon: float
    beside: float | None


def find(configuration: config.Config, workspace: Workspace) -> list[Found]:
    """The main study and those in the folders of `similarity.epsilon_studies`, one of each epsilon, smallest first.

    The pattern starts at the workspace's folder, or at the root if it is absolute. Folders without AT models are none.
    """
    main = configuration.threat_model.epsilon
    found = [Found(workspace, main, None)]
    pattern = configuration.similarity.epsilon_studies
    for name in sorted(glob.glob(pattern, root_dir=workspace.root)) if pattern else []:
        other = Workspace(workspace.root / name)
        epsilon = _trained_epsilon(other, configuration.seeds[0])
        if epsilon is not None and not any(math.isclose(epsilon, known.epsilon) for known in found):
            found.append(Found(other, epsilon, epsilon))
    return sorted(found, key=lambda each: each.epsilon)


def _trained_epsilon(workspace: Workspace, seed: int) -> float | None:
    """The training epsilon of a study's AT models, from the first one found."""
    for scheme in SCHEMES:
        for folder in (workspace.model(model_name(scheme, "AT", seed)), workspace.pretrained(pretraining_name(scheme, "at", seed))):
            path = Path(folder) / "model.json"
            epsilon = read_json(path, remedy=REMEDY).get("parameters", {}).get("threat_model", {}).get("epsilon") if path.exists() else None
            if epsilon is not None:
                return float(epsilon)
    return None
