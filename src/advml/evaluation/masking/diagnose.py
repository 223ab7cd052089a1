"""Gradient-masking checks: probes on the first test images, compared with the results of the evaluation's attacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from advml import config
from advml.attacks import minimum_norm
from advml.attacks.threat_model import ThreatModel
from advml.core.device import derived_seed, own_randomness
from advml.core.errors import UserError
from advml.data.datasets import Split
from advml.evaluation.attack_suite import AttackSpec, ball
from advml.evaluation.masking.evidence import Evidence
from advml.evaluation.masking.probes import probe
from advml.evaluation.masking.rules import Flag, beyond_tolerance, flags
from advml.evaluation.metrics import survivors
from advml.evaluation.run_attacks import Scorer
from advml.evaluation.samples import Outcome

SQUARE, SQUARE_FLAG = "worst_case/square", "black_box_stronger"
NOT_COPIED = Flag(
    "not_copied",
    "the model cannot be copied, so the success of attacks is judged by the attacked model itself, whose state may have changed",
    "make copy.deepcopy(model) work (no open files, no handles, no non-leaf tensors), then evaluate again",
)


def diagnose(
    network: nn.Module,
    scorer: Scorer,
    split: Split,
    outcomes: Mapping[str, Outcome],
    spec: config.Diagnostics,
    threat_model: ThreatModel,
    *,
    classes: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Run the probes and rules; returns, for JSON: `flags`, their `evidence`, `minimal` distances if requested, and the `broken` images.

    If the probes fail on the model, the result is that of `unprobed`.
    """
    results = ProbeResults()
    images, labels = scorer.machine.images(split.images[: spec.images]), split.labels[: spec.images].to(scorer.machine.device)
    white, black = _after_attacks(outcomes, len(labels))
    try:
        with scorer.machine.autocast():
            evidence = probe(
                network,
                images,
                labels,
                threat_model=threat_model,
                classes=classes,
                steps=spec.steps,
                seed=seed,
                shares=spec.shares,
                white_box=white,
                black_box=black,
                on_broken=results.add,
            )
    except UserError as reason:
        return unprobed(network, scorer, outcomes, reason=str(reason))
    found, raised, standing = {}, [], survivors(outcomes)
    if spec.minimal:
        about = {"norm": threat_model.norm, "steps": spec.minimal_steps, "seed": seed}
        distances, nearest = minimum_norm.minimal_distances(spec.minimal, network, images, labels, **about)
        (near,) = ((distances > 0) & (distances <= threat_model.epsilon)).nonzero(as_tuple=True)
        results.add(spec.minimal, near, nearest[near])
        found["minimal"], raised = _security_curve(distances.cpu(), evidence, standing[: len(labels)], spec)
    broken = results.scored(scorer, split, standing, threat_model, seed=seed, batch_size=batch_size)
    evidence = replace(evidence, figure_broken=sum(len(broken[kind]["rows"]) for kind in PROBES))
    judged = flags(evidence)
    judged += _square(outcomes) if not any(flag.name == SQUARE_FLAG for flag in judged) else []
    judged += raised + _not_copied(network, scorer)
    return {"flags": [flag.as_record() for flag in judged], "evidence": evidence.as_record(), "broken": broken, **found}


def unprobed(network: nn.Module, scorer: Scorer, outcomes: Mapping[str, Outcome], *, reason: str) -> dict[str, Any]:
    """Result of diagnostics without probes: `skipped` (the reason), and the flags that need no probes."""
    judged = _square(outcomes) + _not_copied(network, scorer)
    return {"flags": [flag.as_record() for flag in judged], "skipped": reason}


def _not_copied(network: nn.Module, scorer: Scorer) -> list[Flag]:
    return [NOT_COPIED] if scorer.network is network else []


def _square(outcomes: Mapping[str, Outcome]) -> list[Flag]:
    """Flag if Square breaks test images that survive all gradient attacks."""
    if not _square_is_last(outcomes):
        return []
    before = survivors({name: outcome for name, outcome in outcomes.items() if name != SQUARE})
    broken, standing = int((before & ~survivors(outcomes)).sum()), int(before.sum())
    if not beyond_tolerance(broken, standing):
        return []
    saw = f"Square breaks {broken} of {standing} test images that survive all gradient attacks"
    return [
        Flag(SQUARE_FLAG, saw, "white-box attacks with a smooth substitute for the layer that masks gradients (BPDA), and more queries")
    ]


def _square_is_last(outcomes: Mapping[str, Outcome]) -> bool:
    """Whether Square comes after all gradient attacks; else the images that it breaks first show nothing about gradients."""
    return list(outcomes)[-1:] == [SQUARE]


def _after_attacks(outcomes: Mapping[str, Outcome], count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Masks of the first images that survive all gradient attacks, and of those that survive Square after them."""
    white = survivors({name: outcome for name, outcome in outcomes.items() if name != SQUARE})
    after = survivors(outcomes)
    return white[:count], {"square": after[:count]} if _square_is_last(outcomes) else {}


def _security_curve(distances: Tensor, evidence: Evidence, standing: Tensor, spec: config.Diagnostics) -> tuple[dict[str, Any], list[Flag]]:
    """Security curve from minimal distances, with PGD's at each epsilon; raises a flag if it is lower than the worst case."""
    epsilons = [point.epsilon for point in evidence.curve]
    accuracies = minimum_norm.security_curve(distances, torch.tensor(epsilons)).tolist()
    curve = [
        {"epsilon": point.epsilon, "accuracy": value, "pgd": point.accuracy}
        for point, value in zip(evidence.curve, accuracies, strict=True)
    ]
    found = {"attack": spec.minimal, "library": "foolbox", "steps": spec.minimal_steps, "n": len(distances), "curve": curve}
    found["distances"] = [value if value < torch.inf else None for value in distances.tolist()]
    nearer = int((standing & (distances <= evidence.epsilon)).sum())
    if not beyond_tolerance(nearer, evidence.n):
        return found, []
    saw = f"{spec.minimal} breaks, within {evidence.epsilon:.4g}, {nearer} of {evidence.n} samples that survive all other attacks"
    return found, [Flag("minimal_stronger", saw, "more steps and restarts in worst_case; report the smaller of the two accuracies")]


# Images broken by probes count in the worst case, after the same scoring as for its own attacks

Broken = dict[str, list[Any]]  # rows of the split in ascending order, predicted classes, distances

# Name of a probe as a step of the worst case -> description; a minimum-norm attack has its own name.
PROBES = {
    "probe-pgd": "PGD of the security curve, at all its radii up to epsilon",
    "probe-step": "one step of epsilon",
    "probe-noise": "random noise",
}


class ProbeResults:
    """Misclassified images found by the probes, by kind, in the order in which they count."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, kind: str, rows: Tensor, images: Tensor) -> None:
        """Add adversarial images (n, C, H, W) for rows (n,) of the split; a kind is also recorded if it has found none."""
        self.kinds.setdefault(kind, []).append((rows, images))

    def scored(
        self, scorer: Scorer, split: Split, standing: Tensor, threat_model: ThreatModel, *, seed: int, batch_size: int
    ) -> dict[str, Broken]:
        """Score the images, kind by kind, and keep those that break an image in the mask `standing` (N,); for JSON."""
        left, found = standing.clone(), {}
        for kind, parts in self.kinds.items():
            broken: list[tuple[int, int, float]] = []
            pieces = [piece for rows, images in parts for piece in zip(rows.split(batch_size), images.split(batch_size), strict=True)]
            for number, (rows, images) in enumerate(pieces):
                places = left[rows.cpu()].nonzero().squeeze(1)
                if not len(places):
                    continue
                chosen, adversarial = rows.cpu()[places], images[places.to(images.device)]
                with own_randomness(derived_seed("finds", kind, seed, number), images.device):
                    clean = scorer.machine.images(split.images[chosen])
                    predicted, size = (value.cpu() for value in scorer.judge(kind, adversarial, clean, threat_model=threat_model))
                wrong = predicted != split.labels[chosen]
                left[chosen[wrong]] = False
                broken += zip(chosen[wrong].tolist(), predicted[wrong].tolist(), size[wrong].tolist(), strict=True)
            columns = zip(*sorted(broken), strict=True) if broken else ((), (), ())
            found[kind] = dict(zip(("rows", "as", "distances"), map(list, columns), strict=True))
        return found


def as_attacks(
    diagnosis: Mapping[str, Any], outcomes: Mapping[str, Outcome], spec: config.Diagnostics, threat_model: ThreatModel
) -> tuple[list[AttackSpec], dict[str, Outcome]]:
    """Images broken by the probes of `diagnose`, as further steps of the cascade, each on the images that earlier steps have left.

    Their forward and backward passes are recorded in the evidence.
    """
    settings = {**ball(threat_model), "images": spec.images, "steps": spec.steps, "shares": list(spec.shares)}
    settings |= {"note": "on the images of the diagnostics, whose evidence counts its passes"}
    clean, left = next(iter(outcomes.values())), survivors(outcomes)
    attacks, steps = [], {}
    for kind, broken in diagnosis.get("broken", {}).items():
        attack = AttackSpec(f"worst_case/{kind}", settings={"attack": PROBES.get(kind, kind), **settings}, left_only=True)
        rows = left[: spec.images].nonzero().squeeze(1)
        right, predicted = ~torch.isin(rows, torch.tensor(broken["rows"], dtype=torch.long)), clean.predicted[rows]
        distance, nothing = torch.full((len(rows),), torch.nan), torch.zeros(len(rows))
        predicted[~right], distance[~right] = torch.tensor(broken["as"], dtype=torch.long), torch.tensor(broken["distances"])
        attacks.append(attack)
        steps[attack.name] = Outcome(rows, right, predicted, distance, nothing, nothing)
        left[rows] = right
    return attacks, steps
