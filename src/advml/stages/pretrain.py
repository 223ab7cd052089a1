"""`pretrain SCHEME PHASE`: an encoder with its scheme's own head, trained with or without the adversary."""

from __future__ import annotations

from typing import Any

from advml.attacks.adversary import training_adversary
from advml.networks import models
from advml.paths import pretraining_name
from advml.runtime.machine import derived_seed
from advml.stages.context import Context
from advml.stages.learning import Job, learn
from advml.training.schemes import SCHEMES
from advml.training.tasks import pretraining_task


def run(context: Context, *, scheme: str, phase: str, seed: int, reuse: bool = False) -> dict[str, Any]:
    """Write `models/pretrain/<SCHEME>-<PHASE>-s<seed>/`; returns its model.json."""
    row, attacked = SCHEMES[scheme], phase == "at"
    sections = [
        "data",
        "model",
        "temperature",
        f"views.{row.view}",
        f"pretrain.{scheme}",
        *(["threat_model", "attack"] if attacked else []),
    ]
    network = models.build(context.architecture(head=row.head, attacked=attacked), seed=derived_seed("weights", scheme, seed))
    job = Job(
        stage="pretrain",
        name=pretraining_name(scheme, phase, seed),
        folder=context.workspace.pretrained(pretraining_name(scheme, phase, seed)),
        network=network,
        phase=context.config.pretrain[scheme],
        task=lambda: pretraining_task(network, row, context.config),
        adversary=training_adversary(context.config) if attacked else None,
        seed=derived_seed("pretrain", scheme, phase, seed),
        identity={"kind": "pretrain", "scheme": scheme, "phase": phase, "seed": seed},
        parameters=context.parameters(*sections),
    )
    return learn(context, job, reuse=reuse)
