"""The adversarial images that compared models are shown: those which `evaluate` has stored, or the same attack now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from advml import config
from advml.attacks.adversary import evaluation_adversary
from advml.data import adversarial
from advml.data.adversarial import AdversarialImages
from advml.data.datasets import Dataset
from advml.errors import UserError
from advml.evaluation import accuracy
from advml.networks.models import Network
from advml.paths import home_of
from advml.recipes import SCHEMES
from advml.runtime.machine import Machine

OWN = "own"


def wanted(configuration: config.Config, dataset: Dataset) -> dict[str, Any]:
    """What the record of stored adversarial images must say: the attack that params.yaml asks for, and the number of images."""
    spec = configuration.evaluate
    attack = asdict(evaluation_adversary(configuration, epsilon=configuration.attacked_epsilon))
    limit = len(dataset.test) if spec.adversarial_images is None else min(spec.adversarial_images, len(dataset.test))
    return attack.pop("threat_model") | attack | {"seed": spec.seed, "batch_size": spec.batch_size, "n": limit}


def adversarial_images(
    folder: Path,
    record: Mapping[str, Any],
    network: Network,
    dataset: Dataset,
    configuration: config.Config,
    machine: Machine,
    *,
    anew: bool,
) -> AdversarialImages:
    """Of a model in `folder` with this model.json: the stored ones if they were made as params.yaml asks, else new ones.

    Args:
        anew: attack where there are none, or none that fit; False: refuse, as a DVC stage must not do another's work.
    Raises:
        UserError: they do not fit and `anew` is False, or they are damaged.
    """
    home, name = home_of(folder) or (None, Path(os.path.abspath(folder)).name)
    if home and record["data"]["digest"] == dataset.digest and home.adversarial(name).exists():
        stored = adversarial.read(home.adversarial(name), digest=record["digest"])
        differing = [key for key, value in wanted(configuration, dataset).items() if key in stored.record and stored.record[key] != value]
        if not differing:
            return stored
        if not anew:
            told = ", ".join(f"{key} {stored.record[key]} instead of {wanted(configuration, dataset)[key]}" for key in differing)
            raise UserError(f"{home.adversarial(name)} was made with {told}; measure again with: dvc repro, or advml evaluate")
    elif not anew:
        raise UserError(f"{name} has no adversarial images; make them with: dvc repro, or advml evaluate")
    images, attack = accuracy.attacked(network, dataset.test, configuration, SCHEMES[record["scheme"]], machine)
    return AdversarialImages(images, {"model": name, "digest": record["digest"]} | attack)


def shown(source: str, attacked: Mapping[str, AdversarialImages]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Which adversarial images each model sees, and how they were made, by `similarity.source`.

    Raises:
        UserError: the source is none of the models.
    """
    if source != OWN and source not in attacked:
        raise UserError(f"similarity.source = {source!r}; choose from {', '.join((OWN, *attacked))}")
    chosen = {name: attacked[name if source == OWN else source] for name in attacked}
    return {name: found.images for name, found in chosen.items()}, {name: found.record for name, found in chosen.items()}
