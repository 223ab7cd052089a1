"""What speaks against a model's figures: diagnostics on its first test images, against the verdicts that the figures rest on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from advml import config
from advml.attacks import minimal
from advml.attacks.threat import ThreatModel
from advml.data.datasets import Split
from advml.errors import UserError
from advml.evaluation.accuracy import survivors
from advml.evaluation.diagnostics.evidence import Evidence
from advml.evaluation.diagnostics.flags import Flag, flags
from advml.evaluation.diagnostics.probing import probe
from advml.evaluation.diagnostics.rules import beyond_tolerance
from advml.evaluation.measure import Outcome
from advml.runtime.machine import Machine

SQUARE, SQUARE_FLAG = "worst_case/square", "black_box_stronger"


def look(
    network: nn.Module, split: Split, outcomes: Mapping[str, Outcome], configuration: config.Config, machine: Machine, *, classes: int
) -> dict[str, Any]:
    """`flags`, the `evidence` they rest on, and where asked for `minimal` distances; JSON-able. A model that cannot be copied has none."""
    spec, threat_model = configuration.diagnostics, ThreatModel(configuration.threat_model.norm, configuration.attacked_epsilon)
    images, labels = machine.images(split.images[: spec.images]), split.labels[: spec.images].to(machine.device)
    white, black = _verdicts(outcomes, len(labels))
    try:
        with machine.autocast():
            evidence = probe(
                network,
                images,
                labels,
                threat_model=threat_model,
                classes=classes,
                steps=spec.steps,
                seed=configuration.evaluate.seed,
                shares=spec.shares,
                white_box=white,
                black_box=black,
            )
    except UserError as reason:
        return {"flags": [], "skipped": str(reason)}
    raised, found = flags(evidence), {"evidence": evidence.as_record()}
    raised += _square(outcomes) if not any(flag.name == SQUARE_FLAG for flag in raised) else []
    if spec.minimal:
        found["minimal"], more = _nearest(network, images, labels, evidence, survivors(outcomes)[: len(labels)], configuration)
        raised += more
    return {"flags": [flag.as_record() for flag in raised], **found}


def _square(outcomes: Mapping[str, Outcome]) -> list[Flag]:
    """The rule on attacks without gradients, on all test images: Square has seen them all."""
    if not _square_is_last(outcomes):
        return []
    before = survivors({name: outcome for name, outcome in outcomes.items() if name != SQUARE})
    broken, standing = int((before & ~survivors(outcomes)).sum()), int(before.sum())
    if not beyond_tolerance(broken, standing):
        return []
    saw = f"Square breaks {broken} of {standing} test images that survive all attacks by gradients"
    return [Flag(SQUARE_FLAG, saw, "white-box attacks through a smooth substitute of the layer at fault (BPDA), and more queries")]


def _square_is_last(outcomes: Mapping[str, Outcome]) -> bool:
    """What Square breaks before others have had a try says nothing about gradients: they are not aimed at it any more."""
    return list(outcomes)[-1:] == [SQUARE]


def _verdicts(outcomes: Mapping[str, Outcome], count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the first images: who survives all attacks by gradients, and who survives Square after them."""
    white = survivors({name: outcome for name, outcome in outcomes.items() if name != SQUARE})
    after = survivors(outcomes)
    return white[:count], {"square": after[:count]} if _square_is_last(outcomes) else {}


def _nearest(
    network: nn.Module, images: Tensor, labels: Tensor, evidence: Evidence, standing: Tensor, configuration: config.Config
) -> tuple[dict[str, Any], list[Flag]]:
    """Minimal distances, the security curve they give, beside PGD's at each epsilon."""
    spec, norm, epsilon = configuration.diagnostics, configuration.threat_model.norm, configuration.attacked_epsilon
    distances, _ = minimal.minimal_distances(
        spec.minimal, network, images, labels, norm=norm, steps=spec.minimal_steps, seed=configuration.evaluate.seed
    )
    distances = distances.cpu()
    epsilons = [point.epsilon for point in evidence.curve]
    accuracies = minimal.security_curve(distances, torch.tensor(epsilons)).tolist()
    curve = [
        {"epsilon": point.epsilon, "accuracy": value, "pgd": point.accuracy}
        for point, value in zip(evidence.curve, accuracies, strict=True)
    ]
    found = {"attack": spec.minimal, "library": "foolbox", "steps": spec.minimal_steps, "n": len(labels), "curve": curve}
    found["distances"] = [value if value < torch.inf else None for value in distances.tolist()]
    nearer = int((standing & (distances <= epsilon)).sum())
    if not beyond_tolerance(nearer, evidence.n):
        return found, []
    saw = f"{spec.minimal} comes within {epsilon:.4g} of {nearer} of {evidence.n} samples that survive all attacks"
    return found, [Flag("minimal_stronger", saw, "more steps and restarts in worst_case; quote the smaller figure of the two")]
