"""advml from Python: attack, evaluate, compare and train networks on tensors, without files, folders or a command line.

Every function is also an attribute of the package `advml`, which imports this module on first use:

>>> import advml, torch
>>> _ = torch.manual_seed(0)
>>> images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
>>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
>>> adversarial = advml.attack(model, images, labels, epsilon=8 / 255)

Conventions: images are (N, C, H, W), float in [0, 1] or uint8; labels are int64 (N,). A model is any `torch.nn.Module` that maps float
images in [0, 1] to logits (N, K); computation happens on its device. The functions restore its modes, weights and gradients, the global
random-number generators and torch's settings. They print nothing unless `progress` is set. Invalid arguments raise `advml.UserError`
with a message of one line. The commands of the same names share the implementation.
"""

from __future__ import annotations

# ruff: noqa: F401 - the names of `advml.__all__`, which must be known without importing torch
import advml
from advml.api.attack import attack
from advml.api.evaluate import Evaluation, Interval, evaluate
from advml.api.layers import LayerComparison, Probe, compare_layers, probe_layers
from advml.api.models import load_model
from advml.api.train import Trained, train
from advml.core.errors import Failure, UserError

__all__ = [name for name in advml.__all__ if name != "__version__"]
