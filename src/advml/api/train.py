"""Train one scheme under one regime on tensors, without a study folder."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from advml import config
from advml.api.models import config_of, listed, names_of
from advml.core.device import Machine, deterministic_kernels
from advml.core.errors import UserError
from advml.core.paths import model_name
from advml.core.progress import Bar
from advml.data.tensors import Batches, Labelled, dataset_of, labelled, pair, require
from advml.models import network
from advml.models.memory_format import place
from advml.models.network import Network
from advml.pipeline import plans
from advml.recipes import REGIMES, SCHEMES
from advml.training.checkpoint import Checkpoint
from advml.training.streams import batches_per_epoch
from advml.training.trainer import fit


@dataclass(frozen=True, eq=False, repr=False)
class Trained:
    """Result of `train`: the model and its training curves.

    Attributes:
        model: in eval mode; maps float images in [0, 1] to logits (N, K).
        name: e.g. `CL-Full-AT-s0`.
        pretraining, finetuning: one record per epoch: `epoch`, `train/loss`, `validation/...`; empty if the regime skips that phase.
    """

    model: Network
    name: str
    pretraining: list[dict[str, float]]
    finetuning: list[dict[str, float]]

    def __repr__(self) -> str:
        weights, last = sum(one.numel() for one in self.model.parameters()), (self.finetuning or self.pretraining or [{}])[-1]
        scores = "".join(f", {name} {value:.3f}" for name, value in last.items() if name.startswith("validation/"))
        epochs = f"{len(self.pretraining)} + {len(self.finetuning)} epochs"
        return f"Trained({self.name}, {weights:,} weights, {epochs}{f'; in the last epoch{scores[1:]}' if scores else ''})"

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and model.json into a folder; `load_model` reads it."""
        network.save(self.model, Path(folder), {"name": self.name, "parameters": {"threat_model": self.model.threat_model}})


def train(
    scheme: str,
    regime: str,
    images: Tensor | Batches,
    labels: Tensor | None = None,
    *,
    validation: Labelled,
    classes: int | str | Sequence[str] | None = None,
    params: str | Path | config.Config = "digits",
    overrides: str | Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    progress: bool = False,
) -> Trained:
    """Pretrain and fine-tune one model, as `advml train SCHEME REGIME` does: the same data and settings give the same weights.

    Args:
        scheme: a key of `recipes.SCHEMES`: "SL" supervised, "CL" contrastive (SimCLR), "SCL" supervised contrastive (SupCon), ...
        regime: a key of `recipes.REGIMES`: "ST", "AT", "Partial-AT" or "Full-AT".
        images: (N, C, H, W), float in [0, 1] or uint8; or batches of (images, labels), such as a DataLoader.
        labels: (N,) classes, where `images` is a tensor.
        validation: (images, labels), or batches of them, that select the best epoch. No test split is used: keep one for `evaluate`.
        classes: number of classes or their names; None: one more than the largest label.
        params: the settings: path of a params.yaml, name of a preset ("digits", "smoke", "cifar10", ...), or a loaded Config. That of
            digits has an epsilon of 0.15 and views for digits (no flips); for photos choose another, and give it, or its
            epsilon, to `evaluate`, too, whose default is 8/255.
        overrides: `key=value` strings as after `-S`, such as "model.backbone=resnet18" or "pretrain.CL.epochs=5".
        seed: of weights, batches, views and random starts.
        device: "cpu", "cuda", ...
        folder: where the state of unfinished training is kept, so that the same call resumes it; None: not kept.
        progress: show progress on stderr: bars on a terminal, lines elsewhere.
    Raises:
        UserError: images, labels or settings are not valid, or the backbone cannot be trained on these images.
        Failure: the loss is not finite.

    Example:
        >>> quick = ["pretrain.SL.epochs=1", "attack.steps=1", "regimes.Full-AT.epochs=1"]
        >>> trained = advml.train("SL", "Full-AT", images, labels, validation=(images, labels), overrides=quick)
        >>> trained.name, trained.model(images).shape, len(trained.finetuning)
        ('SL-Full-AT-s0', torch.Size([40, 2]), 1)
    """
    require(scheme in SCHEMES, f"scheme = {scheme!r}; choose from {', '.join(SCHEMES)}")
    require(regime in REGIMES, f"regime = {regime!r}; choose from {', '.join(REGIMES)}")
    chosen, learnt, selecting = config_of(params, listed(overrides)), labelled(images, labels), pair(validation, of="validation")
    dataset = dataset_of(learnt, selecting, names_of(classes or int(learnt.labels.max()) + 1))
    phase, runtime = REGIMES[regime].pretraining, chosen.runtime
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device = {str(device)!r} is not usable here: {str(error).splitlines()[0]}") from None
    machine = Machine(torch.device(device), runtime.precision, compile=runtime.compile, micro_batch=runtime.micro_batch)
    with deterministic_kernels(), tempfile.TemporaryDirectory() as temporary:

        def run(plan: plans.Plan, stage: str) -> list[dict[str, float]]:
            if not plan.task:
                return []
            inputs = config.digest(chosen.model_dump(mode="json"), dataset.digest, scheme, regime, seed, stage)
            checkpoint = Checkpoint(Path(folder or temporary) / stage, inputs)
            total = batches_per_epoch(plan.dataset, plan.phase) * plan.epochs
            with Bar(f"{stage} {scheme} {regime}", total=total, silent=not progress) as bar:

                def show(epoch: int, done: int, loss: Tensor) -> None:
                    bar.reach(total * (epoch - 1) // plan.epochs + done, lambda: f"loss {loss:.3f}")

                return fit(plan, machine, checkpoint=checkpoint, on_batch=show)[1]

        first = plans.pretraining(chosen, dataset, scheme=scheme, phase=phase, seed=seed)
        pretraining = run(first, "pretrain")
        start = place(copy.deepcopy(first.network), machine.device)
        second = plans.finetuning(chosen, dataset, machine, start, scheme=scheme, regime=regime, seed=seed)
        finetuning = run(second, "finetune")
    second.network.threat_model = chosen.threat_model.model_dump()
    return Trained(second.network.eval().requires_grad_(True), model_name(scheme, regime, seed), pretraining, finetuning)
