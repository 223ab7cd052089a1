"""Stage `transfer`: accuracy of each model of the grid on the adversarial images of every other model of its seed."""

from __future__ import annotations

from advml import tracking
from advml.core.progress import Bar
from advml.evaluation import records
from advml.evaluation.transfer import RULE, describe, evaluated, evaluated_models, transfer
from advml.figures.style import to_png
from advml.figures.transfer import transfer_matrices
from advml.pipeline.context import Context


def run(context: Context) -> list[records.Block]:
    """Write `paths.TRANSFER_FILES` into `reports/transfer/`, and the record; returns the results, one block per seed.

    Models of different seeds are not mixed. If the grid has no two evaluated models, transfer.json states this.
    """
    config, workspace = context.config, context.workspace
    groups = {seed: names for seed in config.seeds if len(names := evaluated_models(config.grid, workspace, seed)) > 1}
    made_by = context.made_by({"evaluate": {"batch_size": config.evaluate.batch_size}})
    if not groups:
        records.write_transfer(workspace, [], rule=RULE, picture=None, made_by=made_by)
        return []
    with Bar("transfer", total=sum(len(names) ** 2 for names in groups.values())) as bar:
        blocks = [_block(context, seed, names, bar) for seed, names in groups.items()]
    records.write_transfer(workspace, blocks, rule=RULE, picture=to_png(transfer_matrices(blocks)), made_by=made_by)
    for name in (name for block in blocks for name in block["models"]):
        tracking.log_folder(context.tracking, workspace.model(name))
    tracking.log_result(context.tracking, "transfer")
    return blocks


def _block(context: Context, seed: int, names: list[str], bar: Bar) -> records.Block:
    """Measure one seed, whose networks are in memory together."""
    test, models = context.dataset.test, []
    for name in names:
        record, network = context.load_network(context.workspace.model(name))
        models.append(evaluated(context.workspace, name, network, test, digest=record["digest"]))
    size = context.config.evaluate.batch_size
    found = transfer(models, test, context.machine, batch_size=size, on_pair=lambda source, target: bar.advance(1, f"{source} on {target}"))
    return describe(found, seed=seed)
