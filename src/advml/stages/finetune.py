"""`finetune SCHEME REGIME`: a classifier from a pretrained encoder, as the regime's row says."""

from __future__ import annotations

from typing import Any

from advml.attacks.adversary import training_adversary
from advml.errors import UserError
from advml.paths import model_name, pretraining_name
from advml.runtime.checkpoint import discard
from advml.runtime.machine import derived_seed
from advml.stages.context import Context
from advml.stages.learning import Job, learn
from advml.training.regimes import REGIMES
from advml.training.schemes import SCHEMES
from advml.training.tasks import finetuning_task


def run(context: Context, *, scheme: str, regime: str, seed: int, reuse: bool = False) -> dict[str, Any]:
    """Write `models/finetune/<MODEL>/`; returns its model.json."""
    row, plan = SCHEMES[scheme], REGIMES[regime]
    source = pretraining_name(scheme, plan.pretraining, seed)
    pretrained, network = context.load_network(context.workspace.pretrained(source))
    _check_model(context, pretrained)
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
        parameters=pretrained["parameters"] | context.parameters(*sections),  # so that runs compare by all that made them
    )
    return learn(context, job, reuse=reuse)


def _check_model(context: Context, pretrained: dict[str, Any]) -> None:
    """The network comes from pretraining: a `model` section that describes another one would be recorded, not used."""
    recorded = pretrained["parameters"]["model"]
    for key, value in context.parameters("model")["model"].items():
        if value != recorded.get(key):
            raise UserError(
                f"model.{key} = {value!r}, but {pretrained['name']} was pretrained with {recorded.get(key)!r}; set it back, "
                f"or run: advml pretrain {pretrained['scheme']} {pretrained['phase']} --seed {pretrained['seed']}"
            )
