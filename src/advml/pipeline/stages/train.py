"""`train SCHEME REGIME`: the stages of one model in a row; what the same inputs have made before is not made again."""

from __future__ import annotations

from advml.core import ranks
from advml.data.prepared import require_labels
from advml.pipeline.context import Context
from advml.pipeline.stages import evaluate, finetune, prepare, pretrain
from advml.pipeline.training_stage import check_processes
from advml.recipes import REGIMES


def run(context: Context, *, scheme: str, regime: str, seed: int) -> dict[str, float]:
    """Returns the metrics of the model's evaluation."""
    phases = pretrain.phases(scheme, REGIMES[regime].pretraining) | finetune.phases(scheme, regime)
    check_processes(context.config, phases)  # of both, before the hours of the first one
    if context.machine and ranks.is_first() and not prepare.is_current(context):
        prepare.run(context)
    ranks.barrier()
    require_labels(context.dataset, "fine-tuning")  # before the hours of a pretraining that needs none
    pretrain.run(context, scheme=scheme, phase=REGIMES[regime].pretraining, seed=seed, reuse=True)
    finetune.run(context, scheme=scheme, regime=regime, seed=seed, reuse=True)
    if not ranks.is_first():
        raise SystemExit(0)
    return evaluate.run(context, scheme=scheme, regime=regime, seed=seed, reuse=True)
