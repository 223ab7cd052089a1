"""advml: how robust are supervised and contrastive networks, and what does adversarial training do to them?

>>> import advml
>>> model = advml.load_model("models/finetune/CL-Full-AT-s0")   # a torch.nn.Module in eval mode
>>> logits = model(images)                                     # images: float (N, C, H, W) in [0, 1]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from advml.models.network import Network

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def load_model(path: str | Path) -> Network:
    """Return the trained classifier stored in a folder of `models/finetune/`, in eval mode.

    Args:
        path: the folder that holds `model.safetensors` and `model.json`.
    Returns:
        A module that maps float images (N, C, H, W) in [0, 1] to logits (N, K).
    Raises:
        advml.core.errors.UserError: if the folder is no trained classifier.
    """
    from advml.models.network import load_classifier  # torch takes seconds to import: only when a model is wanted

    return load_classifier(path).eval()
