"""`trust`: score measures of similarity by known orders among small networks, trained on the prepared data for this purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from advml import config
from advml.core.device import generator_for
from advml.core.errors import UserError
from advml.core.io import discard, to_json, write_atomically
from advml.core.progress import Bar
from advml.data.datasets import Dataset, Split
from advml.models.network import Network
from advml.pipeline.context import Context
from advml.pipeline.plans import pretraining
from advml.similarity import trust
from advml.similarity.alternatives import MEASURES
from advml.similarity.compare import Panel, compare
from advml.similarity.represent import CLEAN
from advml.similarity.trust import Variant
from advml.training.checkpoint import Checkpoint
from advml.training.trainer import fit

NOISE = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of training labels that are replaced by random ones
LENGTHS = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # lengths of shorter trainings, as shares of the epochs
# Other architectures; the first two that accept the study's images are used.
OTHERS = ("test_efficientnet", "test_byobnet", "test_resnet", "test_convnext")
IMAGES = 2000  # largest number of training images
SCHEME = "SL"  # scheme of all trainings (standard pretraining), whose labels NOISE changes


def plans(backbone: str, others: Sequence[str], *, epochs: int, seeds: int) -> list[Variant]:
    """Settings of the networks to train."""
    found = [Variant(backbone, seed, noise, epochs) for seed in range(seeds) for noise in NOISE]
    shorter = sorted({max(1, round(share * epochs)) for share in LENGTHS} - {epochs})
    found += [Variant(backbone, seed, 0.0, length) for seed in range(seeds) for length in shorter]
    return found + [Variant(name, seed, 0.0, epochs) for name in others for seed in range(seeds)]


def run(context: Context, *, epochs: int, seeds: int) -> dict[str, Any]:
    """Write `records/trust/measures.json`; returns its content. A repeated run resumes from its last finished epoch."""
    if epochs < 4 or seeds < 2:
        raise UserError(f"trust needs --epochs 4 or more and --seeds 2 or more, not {epochs} and {seeds}, to have networks to order")
    backbone = context.config.model.backbone
    others = [name for name in OTHERS if name != backbone and _takes_the_images(context, name)][:2]
    wanted = plans(backbone, others, epochs=epochs, seeds=seeds)
    spec = context.config.similarity.model_copy(update={"measures": ("cka", *MEASURES)})
    with Bar(f"trust: {len(wanted)} networks", total=len(wanted) + 1) as bar:
        networks = dict(_train(context, wanted, bar.begin))
        bar.begin("similarity")
        images = context.dataset.test.images
        views = dict.fromkeys(((name, CLEAN) for name in networks), lambda place: context.machine.images(images[place]))
        ends = [each for each in wanted if each.noise == 0 and each.epochs == epochs]
        compared = compare(networks, views, len(images), [Panel("depth", each.name, each.name) for each in ends], spec, intervals=False)
    found = {
        "scores": trust.scores(compared, wanted),
        "orders": trust.ORDERS,
        "data": context.dataset.digest,
        "networks": [each.name for each in wanted],
        "epochs": epochs,
        "seeds": seeds,
        "images": sum(compared.similarity.sizes),
        "training_images": min(IMAGES, len(context.dataset.train)),
    }
    found |= context.made_by({key: context.parameters(key)[key] for key in ("model", "similarity")})
    write_atomically(context.workspace.record("trust", "measures"), to_json(found, indent=1))
    for each in wanted:
        discard(context.workspace.scratch(f"trust-{each.name}"))
    return found


def _train(context: Context, wanted: list[Variant], begin: Callable[[str], None]) -> Iterator[tuple[str, Network]]:
    """Train the networks by the study's parameters of SCHEME; yields names and networks."""
    whole, data = context.config, context.dataset
    for each in wanted:
        begin(each.name)
        phase = whole.pretrain[SCHEME].model_copy(update={"epochs": each.epochs, "keep": "last"})
        model = whole.model if each.architecture == whole.model.backbone else _other(whole.model, each.architecture)
        changed = whole.model_copy(update={"pretrain": whole.pretrain | {SCHEME: phase}, "model": model})
        dataset = _relabelled(data, each)
        plan = pretraining(changed, dataset, scheme=SCHEME, phase="st", seed=each.seed)
        inputs = context.fingerprint("pretrain", changed.model_dump(mode="json"), each.name, data.digest)
        checkpoint = Checkpoint(context.workspace.scratch(f"trust-{each.name}"), inputs)
        network, _ = fit(plan, context.machine, checkpoint=checkpoint)
        yield each.name, network.eval()


def _takes_the_images(context: Context, backbone: str) -> bool:
    changed = context.config.model_copy(update={"model": _other(context.config.model, backbone)})
    try:
        pretraining(changed, context.dataset, scheme=SCHEME, phase="st", seed=0)
    except UserError:
        return False
    return True


def _other(model: config.Model, backbone: str) -> config.Model:
    return model.model_copy(update={"backbone": backbone, "options": {}})


def _relabelled(data: Dataset, each: Variant) -> Dataset:
    """Dataset of at most IMAGES training images, with a share of their labels replaced by random ones."""
    count = len(data.train)
    places = torch.randperm(count, generator=generator_for("trust", count))[:IMAGES]
    labels, generator = data.train.labels[places].clone(), generator_for("label noise", each.seed)
    order = torch.randperm(len(labels), generator=generator)[: round(each.noise * len(labels))]
    labels[order] = torch.randint(len(data.classes), (len(labels),), generator=generator)[: len(order)]
    return replace(data, train=Split(data.train.images[places], labels))
