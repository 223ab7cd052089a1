"""Published figures of other methods, for the report of a study with the same data, network and threat model.

In percent, by regime: worst case (AutoAttack), mean under CIFAR-C's corruptions (None: not published), clean. ResNet-18, L-infinity, 8/255,
pretrained by the method that is named. Source: README of the RobustSSL benchmark (commit 79701af); of DeACL its own README (2024-07, mean
of five runs).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from advml.config import ThreatModelSection

SOURCE = "the RobustSSL benchmark (DeACL: its authors)"
HEADERS = ("pretrained by", "fine-tuned by", "clean", "worst case (AutoAttack)", "corrupted")
REGIMES = ("AT", "Partial-AT", "Full-AT")  # their SLF, ALF, AFF

PUBLISHED: dict[str, dict[str, tuple[tuple[float, float | None, float], ...]]] = {
    "cifar10": {
        "ACL": ((39.17, 70.72, 78.22), (40.6, 68.56, 75.53), (49.62, 72.5, 81.25)),
        "A-InfoNCE": ((42.72, 74.09, 83.7), (43.28, 71.61, 80.3), (49.73, 73.8, 82.99)),
        "AdvCL": ((43.18, 73.14, 82.36), (44.05, 71.5, 80.04), (49.61, 73.91, 83.0)),
        "DynACL": ((45.09, 68.67, 75.41), (45.67, 66.69, 72.97), (50.52, 72.81, 81.86)),
        "DeACL": ((46.14, None, 80.82), (45.55, None, 79.39), (50.75, None, 83.64)),
        "DynACL++": ((46.54, 71.96, 79.82), (47.98, 70.89, 78.81), (50.34, 73.07, 81.93)),
        "DynACL-AIR++": ((46.99, 72.11, 81.8), (48.23, 71.74, 79.56), (50.79, 73.56, 82.36)),
    },
    "cifar100": {
        "ACL": ((17.3, 38.59, 45.82), (19.07, 36.78, 43.49), (24.78, 47.0, 57.74)),
        "A-InfoNCE": ((20.41, 41.43, 50.06), (19.53, 37.02, 44.78), (26.11, 48.35, 59.08)),
        "DynACL-AIR++": ((20.61, 43.47, 53.93), (22.96, 42.8, 52.09), (25.58, 46.93, 57.57)),
    },
}


def comparable(data: str, backbone: str, attacked: ThreatModelSection, regimes: Iterable[str]) -> list[list[str]]:
    """Rows of HEADERS, a method and regime each; none where the study's data, backbone or attack differs from theirs.

    Args:
        data: `data.name` of the study.
    """
    same = backbone == "resnet18" and attacked.norm == "linf" and math.isclose(attacked.epsilon, 8 / 255, rel_tol=1e-6)
    return [
        [method, regime, *("-" if value is None else f"{value:.1f}" for value in (clean, worst, corrupted))]
        for method, by_regime in (PUBLISHED.get(data, {}) if same else {}).items()
        for regime, (worst, corrupted, clean) in zip(REGIMES, by_regime, strict=True)
        if regime in regimes
    ]
