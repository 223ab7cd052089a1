"""Stage `finetune SCHEME REGIME`: train a classifier on a pretrained encoder, as the regime asks."""

from __future__ import annotations

from typing import Any

from advml.core import ranks
from advml.core.errors import UserError
from advml.core.paths import model_name, pretraining_name
from advml.core.provenance import check_init
from advml.models.network import Network
from advml.pipeline.context import Context
from advml.pipeline.plans import finetuning
from advml.pipeline.training_stage import Job, learn
from advml.recipes import REGIMES, SCHEMES
from advml.training.checkpoint import discard_finished


def run(context: Context, *, scheme: str, regime: str, seed: int, reuse: bool = False) -> dict[str, Any]:
    """Write `models/finetune/<MODEL>/`; returns the content of its model.json."""
    row, plan = SCHEMES[scheme], REGIMES[regime]
    pretrained, network = load_pretrained(context, scheme=scheme, regime=regime, seed=seed)
    if ranks.is_first():
        discard_finished(context.workspace.scratch(f"pretrain-{pretrained['name']}"), pretrained.get("inputs"))
    learns = plan.finetunes(row)
    sections = [
        "data",
        "model",
        "runtime",
        *([f"regimes.{regime}"] if learns else []),
        *(["threat_model", "attack"] if plan.attacked else []),
    ]
    job = Job(
        stage="finetune",
        name=model_name(scheme, regime, seed),
        folder=context.workspace.model(model_name(scheme, regime, seed)),
        plan=finetuning(context.config, context.dataset, context.machine, network, scheme=scheme, regime=regime, seed=seed),
        identity={
            "kind": "model",
            "scheme": scheme,
            "regime": regime,
            "seed": seed,
            "pretraining": {key: pretrained.get(key) for key in ("name", "digest", "gradient_steps")},
        },
        parameters=pretrained["parameters"] | context.parameters(*sections),  # all that the model depends on
    )
    return learn(context, job, reuse=reuse)


def load_pretrained(context: Context, *, scheme: str, regime: str, seed: int) -> tuple[dict[str, Any], Network]:
    """Record and network (on the device) of the pretraining that this fine-tuning starts from.

    Raises:
        UserError: the pretraining does not exist, or was done with other data or another `model` section.
    """
    source = pretraining_name(scheme, REGIMES[regime].pretraining, seed)
    record, network = context.load_network(context.workspace.pretrained(source))
    _check_model(context, record)
    return record, network


def _check_model(context: Context, pretrained: dict[str, Any]) -> None:
    """Raise UserError if the `model` section differs from that of the pretraining, whose network is the one in use."""
    recorded = pretrained["parameters"]["model"]
    for key, value in context.parameters("model")["model"].items():
        if value != recorded.get(key):
            raise UserError(
                f"model.{key} = {value!r}, but {pretrained['name']} was pretrained with {recorded.get(key)!r}; set it back, "
                f"or run: advml pretrain {pretrained['scheme']} {pretrained['phase']} --seed {pretrained['seed']}"
            )
    check_init(context.config.model.init, pretrained)
