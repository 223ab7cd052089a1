"""`train SCHEME REGIME`: run the stages of one model in order, reusing results of the same inputs."""

from __future__ import annotations

from advml.core import ranks
from advml.core.io import read_json
from advml.core.messages import first_of, tell
from advml.data.prepared import require_labels
from advml.pipeline.context import Context
from advml.pipeline.stages import evaluate, finetune, prepare, pretrain
from advml.recipes import REGIMES


def run(context: Context, *, scheme: str, regime: str, seed: int) -> dict[str, float]:
    """Run all stages; returns the metrics of the model's evaluation."""
    if context.machine and ranks.is_first() and not prepare.is_current(context):
        prepare.run(context)
        _warn_of_models_of_other_data(context)
    ranks.barrier()
    require_labels(context.dataset, "fine-tuning")  # before a pretraining without labels runs for hours
    pretrain.run(context, scheme=scheme, phase=REGIMES[regime].pretraining, seed=seed, reuse=True)
    finetune.run(context, scheme=scheme, regime=regime, seed=seed, reuse=True)
    first = ranks.is_first()
    ranks.leave()
    if not first:
        raise SystemExit(0)
    return evaluate.run(context, scheme=scheme, regime=regime, seed=seed, reuse=True)


def _warn_of_models_of_other_data(context: Context) -> None:
    """Print a warning if models of this study were trained on other data than those that have just been prepared."""
    records = (read_json(path, remedy="restore it with: dvc checkout") for path in context.workspace.models.glob("[!.]*/model.json"))
    others = sorted(record["name"] for record in records if record["data"]["digest"] != context.dataset.digest)
    if others:
        told = f"{context.workspace.prepared} was made anew, and {first_of(others, 3)} were trained on other data"
        tell(f"warning: {told}; to return to it, without these overrides: advml prepare")
