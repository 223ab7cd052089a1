"""Testing the claims on a study: effects, intervals, verdicts, as in `claims.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from advml import config
from advml.claims import verdicts
from advml.claims.evidence import Missing, Study, over_seeds
from advml.claims.hypotheses import CLAIMS, Claim, Part, paper
from advml.paths import Workspace, model_name

RULE = (
    "supported: the whole 95 % interval is on the claimed side of the bound; contradicted: the whole interval is on the other side; "
    "inconclusive: the bound lies within. A claim is contradicted if any part is, supported if all are; not tested if a model is missing. "
    "Two bounds are ours: a change of CKA by 0.02 counts as none, and representations agree above 0.9, which is between the paper's "
    "ST (0.59 to 0.79) and AT networks (0.98 to 0.99)."
)


def check(configuration: config.Config, workspace: Workspace) -> dict[str, Any]:
    """The content of claims.json.

    Effects are means over seeds; intervals resample batches (CKA) or images (accuracy), and seeds where there are several.
    """
    spec = configuration.similarity
    seeds = {seed: _studies(configuration, workspace, seed) for seed in configuration.seeds}
    return {
        "rule": RULE,
        "paper": paper()["source"],
        "seeds": list(configuration.seeds),
        "draws": spec.draws,
        "epsilons": [epsilon for epsilon, _ in _workspaces(configuration, workspace)],
        "claims": [_test(claim, seeds, spec) for claim in CLAIMS],
    }


def _test(claim: Claim, seeds: dict[int, list[Study]], spec: config.Similarity) -> dict[str, Any]:
    parts = [_test_part(part, seeds, spec) for part in claim.parts]
    verdict = verdicts.overall([part["verdict"] for part in parts])
    return {"key": claim.key, "claim": claim.sentence, "verdict": verdict, "parts": parts}


def _test_part(part: Part, seeds: dict[int, list[Study]], spec: config.Similarity) -> dict[str, Any]:
    about = {"name": part.name, "claimed": f"{part.side} {part.bound:g}", "paper": None if part.paper is None else round(part.paper, 4)}
    try:
        estimates = [part.effect(_needed(part, studies)) for studies in seeds.values()]
    except Missing as missing:
        return about | {"verdict": verdicts.judge(None, part.side, part.bound), "missing": str(missing)}
    found = over_seeds(estimates, seed=spec.seed)
    low, high = found.interval
    return about | {
        "effect": _number(found.value),
        "low": _number(low),
        "high": _number(high),
        "verdict": verdicts.judge((low, high), part.side, part.bound),
    }


def _needed(part: Part, studies: list[Study]) -> list[Study]:
    """The main study alone, or all of them in the order of their training epsilons."""
    if not part.several_epsilons:
        return [study for study in studies if study.is_main]
    if len(studies) < 2:
        raise Missing("studies of other training epsilons; run them with: dvc repro pipelines/epsilon/dvc.yaml")
    return studies


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _studies(configuration: config.Config, workspace: Workspace, seed: int) -> list[Study]:
    found = _workspaces(configuration, workspace)
    return [Study(configuration.similarity, other, seed, is_main=other is workspace) for _, other in found]


def _workspaces(configuration: config.Config, workspace: Workspace) -> list[tuple[float, Workspace]]:
    """The main study and those of other training epsilons, by epsilon."""
    pattern = configuration.similarity.epsilon_studies
    folders = sorted(workspace.root.glob(pattern)) if pattern else []
    found = [(configuration.threat_model.epsilon, workspace)]
    for folder in folders:
        other = Workspace(folder)
        epsilon = _trained_epsilon(other, configuration.seeds[0])
        found += [] if epsilon is None else [(epsilon, other)]
    return sorted(found, key=lambda each: each[0])


def _trained_epsilon(workspace: Workspace, seed: int) -> float | None:
    """The training epsilon of a study's AT models, from the first one found."""
    for scheme in ("SL", "CL", "SCL"):
        record = Path(workspace.model(model_name(scheme, "AT", seed)) / "model.json")
        pretraining = workspace.pretrained(f"{scheme}-at-s{seed}") / "model.json"
        for path in (pretraining, record):
            try:
                return float(json.loads(path.read_text(encoding="utf-8"))["parameters"]["threat_model"]["epsilon"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return None
