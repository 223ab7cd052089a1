"""Adversarial test images of a model, stored once by `evaluate` for everything that looks at them later."""

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
from advml.core.io import write_atomically


@dataclass(frozen=True, eq=False)
class AdversarialImages:
    """The first n images of the test split, attacked.

    Attributes:
        images: float32 (n, C, H, W) in [0, 1].
        record: the attack, as in the evaluation's record, and `model`, `digest`: whom it was aimed at.
    """

    images: Tensor
    record: dict[str, Any]


def write(adversarial: AdversarialImages, path: Path) -> None:
    """Store them, whole or not at all."""
    tensors = {"images": adversarial.images.float().contiguous(memory_format=torch.contiguous_format)}
    write_atomically(path, save(tensors, metadata={"record": json.dumps(adversarial.record)}))


def read(path: Path, *, digest: str) -> AdversarialImages:
    """Those of the weights with this sha256.

    Raises:
        UserError: there are none, they are damaged, or were aimed at other weights.
    """
    again = "measure again with: dvc repro, or advml evaluate"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = AdversarialImages(file.get_tensor("images"), json.loads(file.metadata()["record"]))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {again}") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {again}") from None
    if found.record.get("digest") != digest:
        raise UserError(f"{path} was aimed at other weights of {found.record.get('model')}; {again}")
    return found
