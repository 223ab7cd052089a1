"""Save training state atomically and resume exactly: a kill costs at most the current epoch.

The state of an unfinished stage is in `.scratch/<stage>/state.safetensors`, which DVC does not track: tensors, and everything else as
JSON in the file's header. It has a fingerprint of all inputs (parameters, data, pretrained weights, sources): after any change the stage
starts from the beginning. The state of a finished stage is kept until a later stage starts from its outputs, which shows that DVC has
committed them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from advml.core.io import discard, write_atomically

State = dict[str, Tensor]


@dataclass
class Progress:
    """State of a training between two epochs."""

    epoch: int = 0  # epochs finished
    network: State = field(default_factory=dict)
    best: State = field(default_factory=dict)  # weights of the selected epoch
    best_score: float | None = None
    best_epoch: int | None = None
    optimizer: dict[int, State] = field(default_factory=dict)  # parameter index -> its state
    carried: State = field(default_factory=dict)  # further state, e.g. a perturbation or an average
    seconds: float = 0.0  # duration of the epochs
    scaler: dict[str, float] = field(default_factory=dict)  # state of the loss scaler, under fp16
    history: list[dict[str, float]] = field(default_factory=list)


class Checkpoint:
    """Checkpoint in the scratch folder of one stage.

    Args:
        folder: `.scratch/<stage>`.
        fingerprint: of everything that determines the result; a state with another one is discarded. None: only read the state.
    """

    def __init__(self, folder: Path, fingerprint: str | None = None) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.orphan: str | None = None  # MLflow run of a discarded computation
        if fingerprint is not None and self.notes.get("fingerprint") != fingerprint:
            self.orphan = self.notes.get("run_id")
            discard(folder)
            self.note(fingerprint=fingerprint)

    @property
    def _file(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def notes(self) -> dict[str, Any]:
        """Facts stored beside the state, e.g. the id of the MLflow run to continue."""
        return _read_notes(self.folder)

    def note(self, **facts: Any) -> None:
        """Add to `notes`, atomically."""
        write_atomically(self.folder / "notes.json", json.dumps({**self.notes, **facts}).encode())

    def save(self, progress: Progress) -> None:
        """Write the state atomically: a kill leaves the old state or the new one."""
        tensors = {f"network/{key}": value for key, value in progress.network.items()}
        tensors |= {f"best/{key}": value for key, value in progress.best.items()}
        tensors |= {f"carried/{key}": value for key, value in progress.carried.items()}
        tensors |= {f"optimizer/{i}/{key}": value for i, state in progress.optimizer.items() for key, value in state.items()}
        header = {key: getattr(progress, key) for key in ("epoch", "best_score", "best_epoch", "scaler", "history", "seconds")}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(f".{os.getpid()}.part")
        try:
            # clone, because safetensors refuses tensors that share storage (views, tied weights)
            save_file(
                {key: value.detach().clone().contiguous() for key, value in tensors.items()}, temporary, {"progress": json.dumps(header)}
            )
            os.replace(temporary, self._file)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> Progress | None:
        """Last saved state; None if there is none, or the file is damaged."""
        try:
            with safe_open(self._file, framework="pt") as file:
                progress = Progress(**json.loads(file.metadata()["progress"]))
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    kind, _, name = key.partition("/")
                    if kind == "optimizer":
                        index, _, name = name.partition("/")
                        progress.optimizer.setdefault(int(index), {})[name] = file.get_tensor(key)
                    else:
                        getattr(progress, kind)[name] = file.get_tensor(key)
        except (FileNotFoundError, SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
            return None
        return progress


def snapshot(network: nn.Module) -> State:
    """Copy of the present weights and statistics."""
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


def _read_notes(folder: Path) -> dict[str, Any]:
    try:
        notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: neither UTF-8 nor JSON
        return {}
    return notes if isinstance(notes, dict) else {}


def is_unfinished(folder: Path, fingerprint: str) -> bool:
    """Whether a computation with this fingerprint was killed before its end."""
    notes = _read_notes(folder)
    return notes.get("fingerprint") == fingerprint and not notes.get("finished")


def discard_finished(folder: Path, fingerprint: str | None) -> None:
    """Delete the state of a finished computation, when a later stage uses its outputs; the state of an unfinished one is kept.

    Args:
        fingerprint: of the inputs of these outputs, from their record.
    """
    notes = _read_notes(folder)
    if notes.get("finished") and notes.get("fingerprint") == fingerprint:
        discard(folder)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, State]:
    """State tensors of the optimiser by parameter index; hyperparameters come from the configuration."""
    return {
        index: {key: torch.as_tensor(value) for key, value in state.items() if value is not None}
        for index, state in optimizer.state_dict()["state"].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, State]) -> None:
    """Inverse of `optimizer_state`."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
