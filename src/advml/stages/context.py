"""What every stage starts from: configuration, folders, machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from advml.config import Config, digest
from advml.data import datasets
from advml.errors import UserError
from advml.networks import models
from advml.networks.layout import place
from advml.networks.models import Network
from advml.paths import Workspace
from advml.provenance import dvc_stage, git_commit, source_digest
from advml.runtime.machine import Machine, machine


@dataclass(frozen=True)
class Context:
    """Handed to every stage by the command line."""

    config: Config
    workspace: Workspace

    @cached_property
    def machine(self) -> Machine:
        return machine(self.config.runtime)

    @cached_property
    def dataset(self) -> datasets.Dataset:
        return datasets.load(self.workspace.prepared)

    def load_network(self, folder: Path) -> tuple[dict[str, Any], Network]:
        """The record and, on the device, the network of a model trained on the prepared data.

        Raises:
            UserError: it was trained on others. Other splits would have it measured on images it has learnt from.
        """
        record, here = models.read_record(folder), self.dataset.digest
        if (there := record.get("data", {}).get("digest")) != here:
            again = (
                f"pretrain {record['scheme']} {record['phase']}" if "phase" in record else f"train {record['scheme']} {record['regime']}"
            )
            raise UserError(
                f"{folder} was trained on other data ({str(there)[:16]}) than {self.workspace.prepared} holds ({here[:16]}); "
                f"run: dvc repro, or: advml {again} --seed {record['seed']}"
            )
        return record, place(models.load(folder), self.machine.device)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a model was made from, for model.json."""
        data = self.dataset
        counts = {name: len(split) for name, split in data.splits.items()}
        return {
            "git_commit": git_commit(self.workspace.root),
            "dvc_stage": dvc_stage(),
            "versions": {"torch": str(torch.__version__), "timm": version("timm")},
            "data": {"digest": data.digest, "source": data.source, "counts": counts},
            "classes": list(data.classes),
            "input": list(data.shape),
        }

    def parameters(self, *sections: str) -> dict[str, Any]:
        """The named sections (`pretrain.CL` reaches into one) of the resolved configuration, nested as in params.yaml."""
        everything, chosen = self.config.model_dump(mode="json"), {}
        for section in sections:
            head, _, tail = section.partition(".")
            if tail:
                chosen.setdefault(head, {})[tail] = everything[head][tail]
            else:
                chosen[head] = everything[head]
        return chosen

    def made_by(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What a result tells of its making, so that its MLflow run can be rebuilt from the file."""
        return {"git_commit": git_commit(self.workspace.root), "dvc_stage": dvc_stage(), "parameters": parameters}

    def fingerprint(self, *parts: Any) -> str:
        """Of everything that determines a stage's result: parts (parameters, upstream digests), machine settings, sources."""
        return digest(self.parameters("runtime"), source_digest(), *parts)
