"""`finetune SCHEME REGIME`: a classifier from a pretrained encoder, as the regime's row says."""

from __future__ import annotations

from typing import Any

from advml import models
from advml.attacks.adversary import training_adversary
from advml.checkpoint import discard
from advml.paths import model_name, pretraining_name
from advml.regimes import REGIMES
from advml.runtime import derived_seed
from advml.schemes import SCHEMES
from advml.stages.context import Context
from advml.stages.learning import Job, learn
from advml.tasks import finetuning_task


def run(context: Context, *, scheme: str, regime: str, seed: int, reuse: bool = False) -> dict[str, Any]:
    """Write `models/finetune/<MODEL>/`; returns its model.json."""
    row, plan = SCHEMES[scheme], REGIMES[regime]
    source = pretraining_name(scheme, plan.pretraining, seed)
    pretrained = models.read_record(context.workspace.pretrained(source))
    network = models.load(context.workspace.pretrained(source))
    discard(context.workspace.scratch(f"pretrain-{source}"))  # its outputs are in use, so they are safe
    learns = plan.finetunes(row)
    if not plan.keeps_head(row):
        network.attach_classifier(len(context.dataset.classes), seed=derived_seed("head", scheme, regime, seed))
    phase = context.config.regimes[regime]
    sections = ["data", "model", *([f"regimes.{regime}"] if learns else []), *(["threat_model", "attack"] if plan.attacked else [])]
    job = Job(
        stage="finetune",
        name=model_name(scheme, regime, seed),
        folder=context.workspace.model(model_name(scheme, regime, seed)),
        network=network,
        phase=phase,
        task=(lambda: finetuning_task(network, plan, phase, context.dataset.train, context.machine)) if learns else None,
        adversary=training_adversary(context.config) if plan.attacked else None,
        seed=derived_seed("finetune", scheme, regime, seed),
        identity={
            "kind": "model",
            "scheme": scheme,
            "regime": regime,
            "seed": seed,
            "pretraining": {key: pretrained[key] for key in ("name", "digest")},
        },
        parameters=context.parameters(*sections),
    )
    return learn(context, job, reuse=reuse)
