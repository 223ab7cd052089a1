"""Stage `pretrain SCHEME PHASE`: train an encoder with its scheme's head, on clean images or under attack."""

from __future__ import annotations

from typing import Any

from advml.core.messages import tell
from advml.core.paths import pretraining_name
from advml.models.backbones import remark_on_stem
from advml.pipeline.context import Context
from advml.pipeline.plans import pretraining
from advml.pipeline.training_stage import Job, learn
from advml.recipes import SCHEMES


def run(context: Context, *, scheme: str, phase: str, seed: int, reuse: bool = False) -> dict[str, Any]:
    """Write `models/pretrain/<SCHEME>-<PHASE>-s<seed>/`; returns the content of its model.json."""
    row, attacked = SCHEMES[scheme], phase == "at"
    sections = [
        "data",
        "model",
        "runtime",
        "temperature",
        *dict.fromkeys(f"views.{part.view}" for part in row.parts),
        f"pretrain.{scheme}",
        *(["threat_model", "attack"] if attacked else []),
    ]
    plan = pretraining(context.config, context.dataset, scheme=scheme, phase=phase, seed=seed)
    about = plan.network.architecture
    if not plan.init and (remark := remark_on_stem(about.backbone, stem=about.stem, image_size=about.image_size)):
        tell(f"note: {remark}")
    job = Job(
        stage="pretrain",
        name=pretraining_name(scheme, phase, seed),
        folder=context.workspace.pretrained(pretraining_name(scheme, phase, seed)),
        plan=plan,
        identity={"kind": "pretrain", "scheme": scheme, "phase": phase, "seed": seed} | ({"init": plan.init} if plan.init else {}),
        parameters=context.parameters(*sections),
    )
    return learn(context, job, reuse=reuse)
