"""`represent MODEL`: measure the representations of a model outside of the study's grid."""

from __future__ import annotations

from advml.core.errors import UserError
from advml.core.paths import find_model, is_reserved
from advml.pipeline.context import Context
from advml.pipeline.stages.compare import adversarial_images, checked, network_in
from advml.pipeline.stages.represent import measure


def represent_model(context: Context, model: str) -> dict[str, float]:
    """Attack the test images as `evaluate` would, measure the model, and write its record and files; returns the metrics.

    Args:
        model: name or folder of a model that advml has trained in another study, or imported.
    """
    folder = find_model(context.workspace, model)
    if is_reserved(folder.name):
        raise UserError(f"{folder.name} is a name of this study, whose results would be overwritten; copy the folder to another name")
    record, network = checked(context, folder, strict=False), network_in(context, folder)
    attacked = adversarial_images(context, folder, record, network, anew=True)
    return measure(context, folder.name, record["digest"], network, attacked)
