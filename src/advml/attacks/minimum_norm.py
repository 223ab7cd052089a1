"""Minimum-norm attacks, which search for the nearest adversarial example (by foolbox), and the security curve of their distances.

Cost per image in (forward, backward) passes: FMN in L-infinity and DDN (steps + 2, steps); FMN in L2 (2 * steps + 14, 2 * steps), or
half of that for an image that its first run does not break; CW at most (9 * steps + 2, 9 * steps), in practice about 550 to 680 each at
100 steps and 3100 to 5700 at 1000. Two of the forward passes are the final check of the result. Counted with a network of two linear
layers, as the rows of all batches that it received and of all gradients at its logits; K = 10, images of 8 x 8, with and without a bias
for the true class that no attack overcomes.

Accuracy of the distances at 100 steps, on linear models of 192 inputs whose boundary is known: FMN is within 0.1 % in L-infinity and
1.1 % in L2; DDN within 0.1 % for two classes, but 15 to 21 % too far for four, because it follows the cross-entropy; CW within 2.5 % at
distances of 0.09 and more, but up to twice too far at 0.03, where its steps are too coarse. Prefer FMN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from advml.attacks.isolation import Logits, checked, isolated
from advml.attacks.threat_model import NORMS
from advml.core.errors import UserError

# (foolbox, its model, images (N, C, H, W), labels (N,), steps) -> images (N, C, H, W), adversarial where the search succeeded
Search = Callable[[ModuleType, Any, Tensor, Tensor, int], Tensor]


def _library(attack: str) -> Search:
    """Search by foolbox's attack of this name, unmodified."""

    def search(foolbox: ModuleType, model: Any, images: Tensor, labels: Tensor, steps: int) -> Tensor:
        return getattr(foolbox.attacks, attack)(steps=steps).run(model, images, foolbox.criteria.Misclassification(labels))

    return search


def _fmn_l2(foolbox: ModuleType, model: Any, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    """FMN in L2: foolbox's attack, followed by the same attack with a corrected projection, started from the result.

    The projection of foolbox 3.3.4 scales a perturbation by norm / norm = 1: after crossing the boundary the attack never shrinks its
    perturbation, and its distances on a linear model are 6 to 23 times the true ones. With the corrected projection alone, the attack
    may approach the boundary without crossing it. So the first run finds adversarial examples, and the second reduces their distance;
    the result is never further away than foolbox's.
    """
    import eagerpy

    class FMN(foolbox.attacks.L2FMNAttack):
        def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
            delta = x - x0
            norms = delta.flatten(start=1).norms.l2(axis=-1).maximum(1e-12)
            return x0 + delta * (epsilon / norms).minimum(1.0).reshape((len(x), *[1] * (x.ndim - 1)))

    found = _library("L2FMNAttack")(foolbox, model, images, labels, steps)
    (rows,) = (model(found).argmax(1) != labels).nonzero(as_tuple=True)
    if len(rows):
        criterion, start = foolbox.criteria.Misclassification(labels[rows]), eagerpy.astensor(found[rows])
        found[rows] = FMN(steps=steps).run(model, images[rows], criterion, starting_points=start)
    return found


@dataclass(frozen=True)
class Minimal:
    """A minimum-norm attack and its search function for each norm that it supports."""

    title: str
    norms: dict[str, Search]


MINIMAL: dict[str, Minimal] = {
    "fmn": Minimal("Fast Minimum-Norm (Pintor et al. 2021)", {"linf": _library("LInfFMNAttack"), "l2": _fmn_l2}),
    "ddn": Minimal("Decoupled Direction and Norm (Rony et al. 2019)", {"l2": _library("DDNAttack")}),
    "cw": Minimal("Carlini and Wagner (2017)", {"l2": _library("L2CarliniWagnerAttack")}),
}


def _foolbox() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # foolbox imports scipy.ndimage.filters
            import foolbox
    except ImportError as error:
        reason = "" if error.name == "foolbox" else f" ({error})"
        raise UserError(f'minimal-distance attacks need foolbox{reason}; install it with: pip install "advml[distances]"') from None
    return foolbox


def minimal_distances(
    name: str, model: nn.Module, images: Tensor, labels: Tensor, *, norm: str, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Distance to the nearest adversarial example that an attack finds: an upper bound of the distance to the decision boundary.

    FMN and DDN draw random numbers only where a gradient vanishes; CW stops when the loss of the whole batch stalls. So the result
    depends on `seed` and the whole batch, and is reproducible on the CPU. During the attack the model is frozen in eval mode; all state
    is restored afterwards, also after an error (see `isolated`).

    Args:
        name: a key of MINIMAL.
        model: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        images: (N, C, H, W) in [0, 1], contiguous or channels last; the model gets the same memory format.
        labels: true classes (N,).
        norm: one that MINIMAL[name] supports.
        steps: number of gradients; for CW, at most this many in each of its 9 trials of the constant.
        seed: of all random numbers.
    Returns:
        Distances (N,) in the norm: 0 for images that are misclassified already, infinite if no adversarial example was found; and the
        adversarial images (N, C, H, W) in [0, 1], detached, which equal the inputs in these two cases.
    Raises:
        UserError: the name is unknown, the attack does not support the norm, or foolbox is not installed.
        Failure: the model does not return (N, K).
        ValueError: `images` leave [0, 1].
    """
    if name not in MINIMAL:
        raise UserError(f"there is no minimal-distance attack {name!r}; choose from {', '.join(MINIMAL)}")
    if norm not in MINIMAL[name].norms:
        raise UserError(f"the attack {name} does not work in the norm {norm!r}; choose from {', '.join(MINIMAL[name].norms)}")
    foolbox = _foolbox()
    inputs, images = checked(images), images.detach()
    if not len(images):
        return images.new_zeros(0), images.clone()
    with isolated(model, seed=seed), torch.no_grad():
        logits = Logits(model, like=images)
        correct = logits(inputs).argmax(1) == labels
        target = foolbox.PyTorchModel(logits, bounds=(0, 1), device=images.device)
        with torch.enable_grad():  # foolbox takes gradients without switching them on
            found = MINIMAL[name].norms[norm](foolbox, target, inputs, labels.clone(), steps)
        found = found.detach().to(images.dtype).clamp(0, 1)
        # Success is judged on the returned images, which must be finite, and not by the library's report.
        broken = correct & found.isfinite().flatten(1).all(1) & (logits(found).argmax(1) != labels)
    adversarial = torch.where(broken.view(-1, *[1] * (images.ndim - 1)), found, images)
    distances = NORMS[norm].size(adversarial - images)
    return distances.masked_fill(correct & ~broken, torch.inf), adversarial


def security_curve(distances: Tensor, epsilons: Tensor | Sequence[float]) -> Tensor:
    """Accuracy against epsilon: the share of images whose nearest adversarial example is further away than epsilon.

    Args:
        distances: (N,), N at least 1, as `minimal_distances` returns them.
        epsilons: radii (E,), in the same norm.
    Returns:
        Accuracies (E,) in double precision; at 0 that is the clean accuracy.
    """
    radii = torch.as_tensor(epsilons, dtype=torch.float64, device=distances.device)
    return (distances.double() > radii[:, None]).double().mean(1)
