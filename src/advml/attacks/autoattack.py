"""AutoAttack's standard four attacks, through its library (Croce and Hein 2020, "Reliable evaluation of adversarial robustness").

What an image costs that nothing breaks, in (forward, backward) passes at the standard strength for K = 10 and either norm: APGD-CE
(102, 101), APGD-T (919, 909), FAB-T (1828, 900), Square (5003, 0) or less: queries that change nothing are not put to the model.
Counted by a network of two linear layers that adds up the rows of every batch that it is given, and of every gradient that reaches
its logits; its bias for the true class is 100.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn

from advml.attacks.apgd import APGD, TargetedAPGD
from advml.attacks.guard import Logits, checked, guarded
from advml.attacks.square import Square
from advml.attacks.threat import NORMS, ThreatModel
from advml.errors import Failure, UserError

NORM_NAMES = {"linf": "Linf", "l2": "L2"}  # ours -> the library's
TOLERANCE = 1e-5  # how far outside of ball or box a library's point may lie through rounding

# The library warns of zero gradients through a logger, and without one through `warnings`. This one is known to nobody, and is silent.
_SILENT = logging.Logger("advml.attacks.autoattack", level=logging.CRITICAL + 1)


@dataclass(frozen=True)
class Strength:
    """How hard to try; the defaults are AutoAttack's standard.

    Attributes:
        steps: of APGD-CE, and of APGD-T and FAB-T for each target.
        targets: classes that APGD-T and FAB-T aim at, one after another; at most K - 1.
        queries: that Square tries; those that change nothing are not put to the model.
    """

    steps: int = 100
    targets: int = 9
    queries: int = 5000


class LibraryAttack(Protocol):
    """What the library's attacks have in common."""

    def perturb(self, x: Tensor, y: Tensor, /) -> Tensor: ...


Build = Callable[[nn.Module, Strength, dict[str, Any]], LibraryAttack]  # model, strength (targets <= K - 1), what all attacks take


@dataclass(frozen=True)
class Recipe:
    """One of the library's attacks.

    Attributes:
        library: what the library calls it.
        classes: how many it needs at least. The targeted DLR loss divides by a difference that involves the fourth largest logit.
        build: makes it.
    """

    library: str
    classes: int
    build: Build


ATTACKS: dict[str, Recipe] = {
    "apgd-ce": Recipe(
        "apgd-ce",
        2,
        lambda model, strength, common: APGD(model, loss="ce", n_iter=strength.steps, logger=_SILENT, **common),
    ),
    "apgd-t": Recipe(
        "apgd-t",
        4,
        lambda model, strength, common: TargetedAPGD(
            model, n_iter=strength.steps, n_target_classes=strength.targets, logger=_SILENT, **common
        ),
    ),
    "fab-t": Recipe(
        "fab-t",
        2,
        lambda model, strength, common: FABAttack_PT(
            model, targeted=True, n_iter=strength.steps, n_target_classes=strength.targets, **common
        ),
    ),
    "square": Recipe(
        "square",
        2,
        lambda model, strength, common: Square(model, p_init=0.8, resc_schedule=False, n_queries=strength.queries, **common),
    ),
}


def _recipe(name: str) -> Recipe:
    if name not in ATTACKS:
        raise UserError(f"there is no attack {name!r} of AutoAttack; choose from {', '.join(ATTACKS)}")
    return ATTACKS[name]


def applicable(name: str, classes: int) -> bool:
    """Whether the attack works for models of so many classes: APGD-T needs 4, the others 2."""
    return classes >= _recipe(name).classes


def attack(
    name: str, model: nn.Module, images: Tensor, labels: Tensor, *, threat_model: ThreatModel, classes: int, strength: Strength, seed: int
) -> Tensor:
    """Adversarial images of one attack of AutoAttack's standard set.

    Images that the attack breaks come back broken. All others come back as they were: those that it cannot break, those that it
    has lost to NaN, and those that are misclassified from the start.

    Of a model that draws no random numbers and judges each image by itself, what becomes of an image follows from the image and
    `seed`, up to rounding, and not from the rest of the batch. On the CPU the result is the same every time.

    The model is in eval mode and frozen meanwhile. Everything else is as before, also after an error: global generators, modes,
    `requires_grad`, gradients, grad mode, trace function, warnings, standard output; no file is written.

    Args:
        name: a key of ATTACKS.
        model: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        images: (N, C, H, W) in [0, 1], contiguous or channels last, which the model then gets too.
        labels: true classes (N,).
        threat_model: ball and box; L-infinity or L2.
        classes: K.
        strength: steps, targets, queries.
        seed: of everything random.
    Returns:
        Images (N, C, H, W), detached, inside the threat model.
    Raises:
        UserError: there is no such attack, or not for so few classes.
        Failure: the attack left ball or box by more than rounding, or the model does not return (N, K).
        ValueError: if `images` leave [0, 1].
    """
    recipe = _recipe(name)
    if not applicable(name, classes):
        raise UserError(f"the attack {name} needs at least {recipe.classes} classes, and the model has {classes}; leave it out")
    inputs = checked(images)
    if not len(images):
        return images.detach().clone()
    strength = replace(strength, targets=min(strength.targets, classes - 1))
    common = {"norm": NORM_NAMES[threat_model.norm], "eps": threat_model.epsilon, "seed": seed, "device": images.device}
    with guarded(model, seed=seed), torch.no_grad():  # the attacks switch gradients on where they need them
        found = recipe.build(Logits(model, like=images, classes=classes), strength, common).perturb(inputs, labels.clone())
    found = found.detach().to(images.dtype)
    found = torch.where(found.isfinite().flatten(1).all(1).view(-1, *[1] * (images.ndim - 1)), found, images.detach())
    _require_inside(name, found, images, threat_model)
    return threat_model.project(found, images.detach())


def _require_inside(name: str, found: Tensor, images: Tensor, threat_model: ThreatModel) -> None:
    """Raise unless all images found (N, C, H, W) lie in ball and box, up to rounding; that is measured in double precision."""
    distance = NORMS[threat_model.norm].size(found.double() - images.detach().double())
    outside = torch.stack([distance - threat_model.epsilon, -found.flatten(1).amin(1), found.flatten(1).amax(1) - 1]).amax(0)
    worst = float(outside.max())  # amax and max hand on NaN, and no comparison with NaN holds
    if not worst <= TOLERANCE:
        ball = f"{threat_model.norm} ball of radius {threat_model.epsilon:g}"
        raise Failure(f"the attack {name} left the {ball} or the box [0, 1] by {worst:g}; leave it out, and report its library's version")
