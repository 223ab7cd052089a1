"""Test the claims on a study: effects, intervals and verdicts, the content of `claims.json`."""

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


@dataclass(frozen=True)
class Found:
    """The main study (`beside` is None) or another one, with the epsilon of its adversarial training."""

    workspace: Workspace
    epsilon: float
    beside: float | None


def find(workspace: Workspace, *, epsilon: float, others: str | None, seed: int) -> list[Found]:
    """Find the main study and others of different training epsilons: one per epsilon, smallest first.

    Args:
        workspace: of the main study.
        epsilon: training epsilon of the main study.
        others: pattern of the other studies' folders (`similarity.epsilon_studies`), relative to the workspace; folders without AT
            models are ignored.
        seed: of the model from which the epsilon is read.
    """
    found = [Found(workspace, epsilon, None)]
    for name in sorted(glob.glob(others, root_dir=workspace.root)) if others else []:
        other = Workspace(workspace.root / name)
        trained = _trained_epsilon(other, seed)
        if trained is not None and not any(math.isclose(trained, known.epsilon) for known in found):
            found.append(Found(other, trained, trained))
    return sorted(found, key=lambda each: each.epsilon)


def _trained_epsilon(workspace: Workspace, seed: int) -> float | None:
    """Training epsilon of a study, read from the first AT model found; None: there is none."""
    for scheme in SCHEMES:
        for folder in (workspace.model(model_name(scheme, "AT", seed)), workspace.pretrained(pretraining_name(scheme, "at", seed))):
            path = Path(folder) / "model.json"
            epsilon = read_json(path, remedy=REMEDY).get("parameters", {}).get("threat_model", {}).get("epsilon") if path.exists() else None
            if epsilon is not None:
                return float(epsilon)
    return None


EPSILONS = "python pipelines/epsilon/run.py 0.05 0.3"
RULE = (
    "supported: the whole 95 % interval is on the claimed side of the bound; contradicted: the whole interval is on the other side; "
    "inconclusive: the bound is within the interval, or there are too few batches for an interval. "
    "One seed is one training, which can neither support nor contradict a paper, so its verdicts say 'for this seed'. "
    "A claim is contradicted if any part is, supported if all are; not tested if a model is missing, or was measured in another way, or if "
    "an accuracy is that of a model at chance. "
    f"Two bounds are not the paper's: a change of CKA up to {MARGIN:g} counts as none, so a rise is above {MARGIN:g}, a fall below "
    f"-{MARGIN:g}, no fall above -{MARGIN:g}; and representations agree above {AGREE:g}, which is between the paper's ST (0.59 to 0.79) "
    "and AT networks (0.98 to 0.99)."
)
OVER_IMAGES = "jackknife over batches for CKA; differences of accuracies paired by image"
INTERVALS = {
    1: f"over test images alone ({OVER_IMAGES}); the variation between trainings is not included",
    2: f"over two seeds, a t interval of one degree of freedom, which is very wide unless they agree, and over test images ({OVER_IMAGES})",
    3: f"over seeds, a t interval, and over test images ({OVER_IMAGES})",
}


def check(
    workspace: Workspace,
    *,
    seeds: Sequence[int],
    epsilon: float,
    attacked: ThreatModelSection,
    others: str | None = None,
    measures: Sequence[str] = ("cka",),
) -> dict[str, Any]:
    """Content of claims.json. Effects are means over seeds; `intervals` says how their intervals are computed.

    Args:
        epsilon: of training.
        attacked: norm and epsilon of the evaluation's attacks.
        others: see `find`.
        measures: measures of similarity under which claims are tested, CKA first.
    """
    found = find(workspace, epsilon=epsilon, others=others, seed=seeds[0])
    studies = [[Study(attacked, each.workspace, seed, epsilon=each.beside) for each in found] for seed in seeds]
    return {
        "rule": RULE,
        "paper": paper()["source"],
        "seeds": list(seeds),
        "intervals": INTERVALS[min(len(seeds), 3)],
        "epsilons": [each.epsilon for each in found],
        "claims": [_test(claim, studies, others) | _under_measures(claim, studies, others, measures) for claim in CLAIMS],
    }


def _test(claim: Claim, seeds: list[list[Study]], others: str | None) -> dict[str, Any]:
    tested = [_test_part(part, seeds, others) for part in claim.parts]
    about = {"key": claim.key, "claim": claim.sentence}
    verdict = overall([verdict for verdict, _ in tested])
    return about | _worded(verdict, len(seeds)) | {"parts": [part | _worded(verdict, len(seeds)) for verdict, part in tested]}


def _under_measures(claim: Claim, seeds: list[list[Study]], others: str | None, names: Sequence[str]) -> dict[str, Any]:
    """Verdicts on a claim's changes of similarity under every measure (`measures`), if there are others than CKA.

    `cka_alone` is true if CKA supports or contradicts them, and no other measure gives the same verdict.
    """
    parts = [part for part in claim.parts if part.measures == "any"]
    if not parts or len(names) < 2:
        return {}
    under, verdicts = {}, {}
    for name in names:
        studies = [[study.under(name) for study in found] for found in seeds]
        tested = [_test_part(part, studies, others) for part in parts]
        verdicts[name] = overall([verdict for verdict, _ in tested])
        sides = sum(
            _on_claimed_side(part, effect)
            for part, (_, found) in zip(parts, tested, strict=True)
            if (effect := found.get("effect")) is not None
        )
        under[name] = _worded(verdicts[name], len(seeds)) | {
            "claimed_side": sides,
            "of": len(parts),
            "parts": [found for _, found in tested],
        }
    decided = verdicts["cka"] in ("supported", "contradicted")
    alone = decided and verdicts["cka"] not in [verdict for name, verdict in verdicts.items() if name != "cka"]
    return {"measures": under, "cka_alone": alone}


def _on_claimed_side(part: Part, effect: float) -> bool:
    return effect > part.bound if part.side == "above" else effect < part.bound


def _worded(verdict: Verdict, seeds: int) -> dict[str, Any]:
    """Entries of claims.json for a verdict: its text and the number of seeds behind it."""
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
    """Studies that a part needs: the main one, or all in the order of their training epsilons."""
    if not part.several_epsilons:
        return [study for study in found if study.epsilon is None]
    if len(found) < 2:
        state = f"{others!r}, where no AT models of another epsilon are found" if others else "null"
        raise Missing(
            f"no AT models of other training epsilons (similarity.epsilon_studies is {state}); train them with: {EPSILONS}, "
            "then set similarity.epsilon_studies: pipelines/epsilon/eps-* and run: dvc repro. If those studies change later: advml report"
        )
    return found


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
