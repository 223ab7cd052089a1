"""Atomic save and exact resume: a kill at any moment costs at most the current epoch.

The state of an unfinished stage lies in `.scratch/<stage>/state.safetensors`, outside of DVC: tensors, with
everything else as JSON in the file's header. A fingerprint of all inputs (parameters, data, pretrained
weights, source) ties it to one computation: after any change the stage starts afresh. The state of a finished
stage stays until a later stage, by starting from those very outputs, proves that they were committed.
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
    """A training run between two epochs."""

    epoch: int = 0  # epochs finished
    network: State = field(default_factory=dict)
    best: State = field(default_factory=dict)  # weights of the selected epoch
    best_score: float | None = None
    best_epoch: int | None = None
    optimizer: dict[int, State] = field(default_factory=dict)  # parameter index -> its state
    carried: State = field(default_factory=dict)  # what else goes on from epoch to epoch, e.g. a perturbation or an average
    seconds: float = 0.0  # that the epochs took
    scaler: dict[str, float] = field(default_factory=dict)  # of the loss, under fp16
    history: list[dict[str, float]] = field(default_factory=list)


class Checkpoint:
    """The scratch folder of one stage.

    Args:
        folder: `.scratch/<stage>`.
        fingerprint: of everything that determines the result; another one discards the old state. None: to read the state alone.
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
        """Small facts beside the state, e.g. the id of the MLflow run to continue."""
        return _read_notes(self.folder)

    def note(self, **facts: Any) -> None:
        """Add to `notes`, atomically."""
        write_atomically(self.folder / "notes.json", json.dumps({**self.notes, **facts}).encode())

    def save(self, progress: Progress) -> None:
        """Write the state beside the old one, then swap: a kill leaves one of the two, whole."""
        tensors = {f"network/{key}": value for key, value in progress.network.items()}
        tensors |= {f"best/{key}": value for key, value in progress.best.items()}
        tensors |= {f"carried/{key}": value for key, value in progress.carried.items()}
        tensors |= {f"optimizer/{i}/{key}": value for i, state in progress.optimizer.items() for key, value in state.items()}
        header = {key: getattr(progress, key) for key in ("epoch", "best_score", "best_epoch", "scaler", "history", "seconds")}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(f".{os.getpid()}.part")
        try:
            # clone: tensors of one storage (views, tied weights) are refused by safetensors
            save_file(
                {key: value.detach().clone().contiguous() for key, value in tensors.items()}, temporary, {"progress": json.dumps(header)}
            )
            os.replace(temporary, self._file)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> Progress | None:
        """The last saved state, or None; a damaged file counts as none."""
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
    """A copy of weights and statistics as they are now."""
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


def _read_notes(folder: Path) -> dict[str, Any]:
    try:
        notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: neither UTF-8 nor JSON
        return {}
    return notes if isinstance(notes, dict) else {}


def is_unfinished(folder: Path, fingerprint: str) -> bool:
    """Whether a process that had begun this very computation was killed before it had done everything."""
    notes = _read_notes(folder)
    return notes.get("fingerprint") == fingerprint and not notes.get("finished")


def discard_finished(folder: Path, fingerprint: str | None) -> None:
    """Delete the state of the computation whose outputs a later stage uses, and no other: an unfinished one still has to end.

    Args:
        fingerprint: what these outputs were made from, as their record says.
    """
    notes = _read_notes(folder)
    if notes.get("finished") and notes.get("fingerprint") == fingerprint:
        discard(folder)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, State]:
    """The optimiser's tensors by parameter index; hyperparameters follow from the configuration."""
    return {
        index: {key: torch.as_tensor(value) for key, value in state.items() if value is not None}
        for index, state in optimizer.state_dict()["state"].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, State]) -> None:
    """Inverse of `optimizer_state`."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
