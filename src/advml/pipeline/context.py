"""Context of a stage: configuration, folders, device, data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from advml import __version__
from advml.config import Config, digest
from advml.config.store import Place, locate
from advml.core.device import Machine, machine
from advml.core.errors import UserError
from advml.core.paths import Workspace
from advml.core.provenance import check_data, git_commit, source_digest
from advml.data import datasets
from advml.models import network
from advml.models.memory_format import place
from advml.models.network import Network

FEWEST = 4  # least number of images for CKA's estimator


@dataclass(frozen=True)
class Context:
    """Configuration, folders, device and data, which the command line passes to every stage."""

    config: Config
    workspace: Workspace

    @cached_property
    def machine(self) -> Machine:
        return machine(self.config.runtime)

    @cached_property
    def tracking(self) -> Place:
        return locate(self.config.tracking, root=self.workspace.root)

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """Prepared data; raises UserError if values of params.yaml do not fit them, before hours of training."""
        dataset = datasets.load(self.workspace.prepared, verified=self.workspace.verified)
        check_fit(self.config, dataset)
        return dataset

    def load_network(self, folder: Path) -> tuple[dict[str, Any], Network]:
        """Record and network (on the device) of a model that was trained on the prepared data.

        Raises:
            UserError: it was trained on other data.
        """
        record = network.read_record(folder)
        check_data(folder, record, prepared=self.workspace.prepared, here=self.dataset.digest)
        return record, place(network.load(folder), self.machine.device)

    @property
    def provenance(self) -> dict[str, Any]:
        """Origin of a model (commit, data, ...), for model.json."""
        data = self.dataset
        counts = {name: len(split) for name, split in data.splits.items()}
        return {
            "git_commit": git_commit(self.workspace.root),
            # with the digest of sources, because a study of `advml init` is another repository than its advml
            "versions": {"advml": f"{__version__} ({source_digest()[:12]})", "torch": str(torch.__version__), "timm": version("timm")},
            "data": {"digest": data.digest, "source": data.source, "counts": counts},
            "classes": list(data.classes),
            "input": list(data.shape),
            **({"white_level": data.depth["white_level"]} if data.depth else {}),
        }

    def parameters(self, *sections: str) -> dict[str, Any]:
        """Named sections of the resolved configuration, or parts of them (`pretrain.CL`), nested as in params.yaml."""
        everything, chosen = self.config.model_dump(mode="json"), {}
        for section in sections:
            head, _, tail = section.partition(".")
            if tail:
                chosen.setdefault(head, {})[tail] = everything[head][tail]
            else:
                chosen[head] = everything[head]
        return chosen

    def made_by(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Git commit and parameters for the file of a result, from which its MLflow run can be rebuilt.

        Excludes everything that depends on how the stage was started (by DVC or by hand, when, where), because DVC would then report the
        same result as modified.
        """
        return {"git_commit": git_commit(self.workspace.root), "parameters": parameters}

    def fingerprint(self, stage: str, *parts: Any) -> str:
        """Fingerprint of everything that determines a stage's result: sources, machine settings, and `parts` (parameters, digests)."""
        return digest(self.parameters("runtime"), source_digest(stage), stage, *parts)


def check_fit(configuration: Config, dataset: datasets.Dataset) -> None:
    """Refuse values of params.yaml that do not fit these images.

    Raises:
        UserError: one line with the key, its value, and what the data allow.
    """
    channels, height, width = dataset.shape
    for kind in ("supervised", "contrastive"):
        if (pad := getattr(configuration.views, kind).pad) >= min(height, width):
            raise UserError(
                f"views.{kind}.pad = {pad} can shift {height} x {width} images out of view; choose 0 to {min(height, width) - 1}"
            )
    diameter = (channels * height * width) ** 0.5
    phases = {f"{key}.epsilon": phase.epsilon for key, phase in configuration.phases.items()}
    radii = {"threat_model.epsilon": configuration.threat_model.epsilon, "evaluate.epsilon": configuration.evaluate.epsilon} | phases
    for key, epsilon in radii.items():
        if epsilon is not None and configuration.threat_model.norm == "l2" and epsilon > diameter:
            told = f"{channels} x {height} x {width} images in [0, 1] are at most {diameter:.4g} apart"
            raise UserError(f"{key} = {epsilon:g} exceeds the whole range of images: in the norm l2, {told}")
    attacked = min(configuration.evaluate.adversarial_images or len(dataset.test), len(dataset.test))
    if attacked < FEWEST:
        key = "data.max_test" if len(dataset.test) == attacked else "evaluate.adversarial_images"
        raise UserError(f"{key} = {attacked} leaves CKA too few adversarial images; it needs at least {FEWEST}")
    shown, classes = dataset.train.labels[: configuration.similarity.probe_images], len(dataset.classes)
    if len(shown.unique()) < classes:
        told = f"the first {len(shown)} training images are of {len(shown.unique())} of {classes} classes"
        raise UserError(
            f"similarity.probe_images = {configuration.similarity.probe_images} is too few for linear probes: {told}; raise it, or null"
        )
