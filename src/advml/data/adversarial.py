"""Adversarial test images of a model, stored by `evaluate` for later stages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from advml.core.errors import UserError
from advml.core.io import reporting_damage, write_atomically


@dataclass(frozen=True, eq=False)
class AdversarialImages:
    """Adversarial versions of the first n test images.

    Attributes:
        images: float32 (n, C, H, W) in [0, 1].
        record: the attack, as in the evaluation's record, with `model` and `digest` of the attacked model.
    """

    images: Tensor
    record: dict[str, Any]


def write(adversarial: AdversarialImages, path: Path) -> None:
    """Write the images to a file, atomically."""
    tensors = {"images": adversarial.images.float().contiguous(memory_format=torch.contiguous_format)}
    write_atomically(path, save(tensors, metadata={"record": json.dumps(adversarial.record)}))


def read(path: Path, *, digest: str) -> AdversarialImages:
    """Read the adversarial images of the model whose weights have this sha256.

    Raises:
        UserError: the file is missing or damaged, or was made for other weights.
    """
    again = "measure again with: dvc repro, or advml evaluate"
    if not path.exists():
        raise UserError(f"{path} does not exist; {again}")
    with reporting_damage(path, remedy=again, errors=(SafetensorError,)), safetensors.safe_open(path, framework="pt") as file:
        found = AdversarialImages(file.get_tensor("images"), json.loads(file.metadata()["record"]))
    if found.record.get("digest") != digest:
        raise UserError(f"{path} was made for other weights of {found.record.get('model')}; {again}")
    return found
