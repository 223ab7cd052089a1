"""Testing the claims on a study: effects, intervals, verdicts, as in `claims.json`."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advml.claims.claims import AGREE, CLAIMS, MARGIN, SCHEMES, Claim, Part, Verdict, judge, overall, paper, worded
from advml.claims.evidence import REMEDY, Missing, Study, over_seeds
from advml.config import ThreatModelSection
from advml.core.io import read_json
from advml.core.paths import Workspace, model_name, pretraining_name

# The main study and those beside it, which differ in the training epsilon alone.


@dataclass(frozen=True)
class Found:
    """A study and the epsilon that its AT models were trained at. `beside`: that epsilon, None for the main study."""

    workspace: Workspace
    epsilon: float
    beside: float | None


def find(workspace: Workspace, *, epsilon: float, others: str | None, seed: int) -> list[Found]:
    """The main study and those beside it, one of each training epsilon, smallest first.

    Args:
        workspace: of the main study.
        epsilon: its training epsilon.
        others: pattern of the other studies' folders (`similarity.epsilon_studies`), relative to the workspace's; those without AT
            models are left out.
        seed: of the model whose epsilon is read.
    """
    found = [Found(workspace, epsilon, None)]
    for name in sorted(glob.glob(others, root_dir=workspace.root)) if others else []:
        other = Workspace(workspace.root / name)
        trained = _trained_epsilon(other, seed)
        if trained is not None and not any(math.isclose(trained, known.epsilon) for known in found):
            found.append(Found(other, trained, trained))
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


# Testing the claims on a study: effects, intervals, verdicts, as in `claims.json`.

EPSILONS = "python pipelines/epsilon/run.py 0.05 0.3"
RULE = (
    "supported: the whole 95 % interval is on the claimed side of the bound; contradicted: the whole interval is on the other side; "
    "inconclusive: the bound lies within, or there are too few batches for an interval. "
    "One seed is one training, which can neither support nor contradict a paper: its verdicts are 'for this seed'. "
    "A claim is contradicted if any part is, supported if all are; not tested if a model is missing, or was measured in another way. "
    f"Two bounds are ours: a change of CKA by {MARGIN:g} counts as none, so a rise is above {MARGIN:g}, a fall below -{MARGIN:g}, "
    f"and no fall above -{MARGIN:g}; and representations agree above {AGREE:g}, which is between the paper's ST (0.59 to 0.79) "
    "and AT networks (0.98 to 0.99)."
)
OVER_IMAGES = "jackknife over batches for CKA; differences of accuracies paired by image"
INTERVALS = {
    1: f"over test images alone ({OVER_IMAGES}), not over what another training would give",
    2: f"over two seeds, a t interval of one degree of freedom, which is very wide unless they agree, and over test images ({OVER_IMAGES})",
    3: f"over seeds, a t interval, and over test images ({OVER_IMAGES})",
}


def check(
    workspace: Workspace, *, seeds: Sequence[int], epsilon: float, attacked: ThreatModelSection, others: str | None = None
) -> dict[str, Any]:
    """The content of claims.json.

    Effects are means over seeds; what their intervals are made of is in `intervals`.

    Args:
        epsilon: of training.
        attacked: norm and epsilon of the evaluation's attacks.
        others: see `find`.
    """
    found = find(workspace, epsilon=epsilon, others=others, seed=seeds[0])
    studies = [[Study(attacked, each.workspace, seed, epsilon=each.beside) for each in found] for seed in seeds]
    return {
        "rule": RULE,
        "paper": paper()["source"],
        "seeds": list(seeds),
        "intervals": INTERVALS[min(len(seeds), 3)],
        "epsilons": [each.epsilon for each in found],
        "claims": [_test(claim, studies, others) for claim in CLAIMS],
    }


def _test(claim: Claim, seeds: list[list[Study]], others: str | None) -> dict[str, Any]:
    tested = [_test_part(part, seeds, others) for part in claim.parts]
    about = {"key": claim.key, "claim": claim.sentence}
    verdict = overall([verdict for verdict, _ in tested])
    return about | _worded(verdict, len(seeds)) | {"parts": [part | _worded(verdict, len(seeds)) for verdict, part in tested]}


def _worded(verdict: Verdict, seeds: int) -> dict[str, Any]:
    """A verdict as claims.json has it, and the number of seeds behind it."""
    return {"verdict": worded(verdict, seeds=seeds), "seeds": 0 if verdict == "not tested" else seeds}


def _test_part(part: Part, seeds: list[list[Study]], others: str | None) -> tuple[Verdict, dict[str, Any]]:
    about = {
        "name": part.name,
        "claimed": f"{part.side} {part.bound:g}",
        "side": part.side,
        "bound": part.bound,
        "paper": None if part.paper is None else round(part.paper, 4),
    }
    try:
        measured = [part.effect(_needed(part, found, others)) for found in seeds]
        found = over_seeds(measured)
    except Missing as missing:
        return judge(None, part.side, part.bound), about | {"missing": str(missing)}
    low, high = found.interval
    doubts = {name: said for each in measured for name, said in each.doubts.items()}
    numbers = {"effect": _number(found.value), "low": _number(low), "high": _number(high)}
    return judge((low, high), part.side, part.bound), about | numbers | ({"doubts": doubts} if doubts else {})


def _needed(part: Part, found: list[Study], others: str | None) -> list[Study]:
    """The main study alone, or all of them in the order of their training epsilons."""
    if not part.several_epsilons:
        return [study for study in found if study.epsilon is None]
    if len(found) < 2:
        state = f"{others!r}, which holds no AT models of another epsilon" if others else "null"
        raise Missing(
            f"AT models of other training epsilons (similarity.epsilon_studies is {state}); train them with: {EPSILONS}, "
            "then set similarity.epsilon_studies: pipelines/epsilon/eps-* and run: dvc repro. After later changes of theirs: advml report"
        )
    return found


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
