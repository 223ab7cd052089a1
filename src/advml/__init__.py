"""advml: how robust are supervised and contrastive networks, and what does adversarial training do to them?

>>> import advml
>>> model = advml.load_model("models/finetune/CL-Full-AT-s0")                                     # doctest: +SKIP
>>> measured = advml.evaluate(model, images, labels, epsilon=8 / 255)                             # doctest: +SKIP

The functions are those of `advml.api`. They and torch are imported on first use, not when the package is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advml.api.attack import attack
    from advml.api.evaluate import Evaluation, Interval, evaluate
    from advml.api.layers import LayerComparison, Probe, compare_layers, probe_layers
    from advml.api.models import load_model
    from advml.api.train import Trained, train
    from advml.core.errors import Failure, UserError

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "load_model",
    "attack",
    "evaluate",
    "compare_layers",
    "probe_layers",
    "train",
    "Evaluation",
    "Interval",
    "LayerComparison",
    "Probe",
    "Trained",
    "UserError",
    "Failure",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'advml' has no attribute {name!r}")
    from advml import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
