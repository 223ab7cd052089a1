"""What speaks against a model's figures: diagnostics on its first test images, against the verdicts that the figures rest on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from advml import config
from advml.attacks import minimum_norm
from advml.attacks.threat_model import ThreatModel
from advml.data.datasets import Split
from advml.errors import UserError
from advml.evaluation.attack_suite import AttackSpec, threat_of
from advml.evaluation.masking.evidence import Evidence
from advml.evaluation.masking.probes import probe
from advml.evaluation.masking.rules import Flag, beyond_tolerance, flags
from advml.evaluation.metrics import survivors
from advml.evaluation.run_attacks import Outcome, Scorer
from advml.runtime.machine import Machine, derived_seed, own_randomness

SQUARE, SQUARE_FLAG = "worst_case/square", "black_box_stronger"
NOT_COPIED = Flag(
    "not_copied",
    "the model cannot be copied: what decides whether an attack has succeeded is the very model that has been attacked",
    "make copy.deepcopy(model) work (no open files, no handles, no tensors with a history), then evaluate again",
)


def diagnose(
    network: nn.Module,
    scorer: Scorer,
    split: Split,
    outcomes: Mapping[str, Outcome],
    configuration: config.Config,
    machine: Machine,
    *,
    classes: int,
) -> dict[str, Any]:
    """`flags`, the `evidence` they rest on, where asked for `minimal` distances, and what of this was `broken`.

    Of a model on which the probes fail there is what `unprobed` gives: `not_copied`, where the scorer has nothing but the model itself,
    and what Square says.
    """
    spec, threat_model, results = configuration.diagnostics, _threat_model(configuration), ProbeResults()
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
                on_broken=results.add,
            )
    except UserError as reason:
        return unprobed(network, scorer, outcomes, reason=str(reason))
    found, raised, standing = {}, [], survivors(outcomes)
    if spec.minimal:
        found["minimal"], raised = _nearest(network, images, labels, evidence, standing[: len(labels)], configuration, results)
    how = {"seed": configuration.evaluate.seed, "batch_size": configuration.evaluate.batch_size}
    broken = results.scored(scorer, split, standing, threat_model, **how)
    evidence = replace(evidence, figure_broken=sum(len(broken[kind]["rows"]) for kind in PROBES))
    judged = flags(evidence)
    judged += _square(outcomes) if not any(flag.name == SQUARE_FLAG for flag in judged) else []
    judged += raised + _not_copied(network, scorer)
    return {"flags": [flag.as_record() for flag in judged], "evidence": evidence.as_record(), "broken": broken, **found}


def unprobed(network: nn.Module, scorer: Scorer, outcomes: Mapping[str, Outcome], *, reason: str) -> dict[str, Any]:
    """The same without probes: `skipped`, the reason, and the flags that need none."""
    judged = _square(outcomes) + _not_copied(network, scorer)
    return {"flags": [flag.as_record() for flag in judged], "skipped": reason}


def counted(
    found: Mapping[str, Any], outcomes: Mapping[str, Outcome], configuration: config.Config
) -> tuple[list[AttackSpec], dict[str, Outcome]]:
    """What `diagnose` has found broken, as further steps of the worst case."""
    broken, first = found.get("broken", {}), configuration.diagnostics.images
    clean = next(iter(outcomes.values()))
    figures = figures_of(broken, _threat_model(configuration), configuration.diagnostics)
    return figures, outcomes_of(broken, survivors(outcomes), clean, first=first)


def _not_copied(network: nn.Module, scorer: Scorer) -> list[Flag]:
    return [NOT_COPIED] if scorer.network is network else []


def _threat_model(configuration: config.Config) -> ThreatModel:
    return ThreatModel(configuration.threat_model.norm, configuration.attacked_epsilon)


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
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    evidence: Evidence,
    standing: Tensor,
    configuration: config.Config,
    results: ProbeResults,
) -> tuple[dict[str, Any], list[Flag]]:
    """Minimal distances, the security curve they give, beside PGD's at each epsilon."""
    spec, norm, epsilon = configuration.diagnostics, configuration.threat_model.norm, configuration.attacked_epsilon
    distances, nearest = minimum_norm.minimal_distances(
        spec.minimal, network, images, labels, norm=norm, steps=spec.minimal_steps, seed=configuration.evaluate.seed
    )
    (near,) = ((distances > 0) & (distances <= epsilon)).nonzero(as_tuple=True)
    results.add(spec.minimal, near, nearest[near])
    distances = distances.cpu()
    epsilons = [point.epsilon for point in evidence.curve]
    accuracies = minimum_norm.security_curve(distances, torch.tensor(epsilons)).tolist()
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


# What the probes break counts in the worst case as what its own attacks break does, after the same scoring

Broken = dict[str, list[Any]]  # rows of the split in rising order, the classes that they are taken for, distances

# What the probes of `diagnostics` are called as steps of the worst case, and what they are; other finds bear the name of their attack.
PROBES = {
    "probe-pgd": "PGD of the security curve, at all its radii up to epsilon",
    "probe-step": "one step of epsilon",
    "probe-noise": "random noise",
}


class ProbeResults:
    """Collects images that are wrong, kind by kind in the order in which they are to count."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, kind: str, rows: Tensor, images: Tensor) -> None:
        """Rows of the split (n,), and their images (n, C, H, W) in the threat model. A kind that has found nothing is noted, too."""
        self.kinds.setdefault(kind, []).append((rows, images))

    def scored(
        self, scorer: Scorer, split: Split, standing: Tensor, threat_model: ThreatModel, *, seed: int, batch_size: int
    ) -> dict[str, Broken]:
        """What of them breaks an image that `standing` (N,) says is left, kind by kind; JSON-able."""
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


def outcomes_of(found: Mapping[str, Broken], standing: Tensor, clean: Outcome, *, first: int) -> dict[str, Outcome]:
    """As steps of the cascade: aimed at what all before them have left of the first images. Their passes are in the evidence."""
    left, steps = standing.clone(), {}
    for kind, broken in found.items():
        rows = left[:first].nonzero().squeeze(1)
        right, predicted = ~torch.isin(rows, torch.tensor(broken["rows"], dtype=torch.long)), clean.predicted[rows]
        distance, nothing = torch.full((len(rows),), torch.nan), torch.zeros(len(rows))
        predicted[~right], distance[~right] = torch.tensor(broken["as"], dtype=torch.long), torch.tensor(broken["distances"])
        steps[f"worst_case/{kind}"] = Outcome(rows, right, predicted, distance, nothing, nothing)
        left[rows] = right
    return steps


def figures_of(found: Mapping[str, Broken], threat_model: ThreatModel, spec: config.Diagnostics) -> list[AttackSpec]:
    """The same steps for the record."""
    settings = {"images": spec.images, "steps": spec.steps, "shares": list(spec.shares)}
    about = {**threat_of(threat_model), **settings, "note": "on the images of the diagnostics, which hold its passes"}
    return [AttackSpec(f"worst_case/{kind}", settings={"attack": PROBES.get(kind, kind), **about}, left_only=True) for kind in found]
