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
from itertools import count
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from advml.attacks.isolation import Logits, checked, isolated
from advml.attacks.per_image_rng import PerImageGenerator, Sample
from advml.attacks.threat_model import NORMS, ThreatModel
from advml.core.errors import Failure, UserError

NORM_NAMES = {"linf": "Linf", "l2": "L2"}  # ours -> the library's
TOLERANCE = 1e-5  # how far outside of ball or box a library's point may lie through rounding

# The library warns of zero gradients through a logger, and without one through `warnings`. This one is not registered, and is silent.
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
    with isolated(model, seed=seed), torch.no_grad():  # the attacks switch gradients on where they need them
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


# APGD with random starts of each image's own

# What the library draws, by its name of the norm, before it stretches that to the surface of the ball.
SAMPLES: dict[str, Sample] = {
    "Linf": NORMS["linf"].sample,
    "L2": lambda like, generator: torch.randn(like.shape, generator=generator),
}


class _OwnStarts:
    """Gives each run of the library's loop the starts that the library would draw for each image alone, one run after another.

    `seed` of the library's attack on an image alone is then `PerImageGenerator(seed).seed_of(image)`. For L-infinity and L2.
    """

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W) of x in [0, 1] with classes y (N,); those that do not break come back as they were."""
        self.draws = PerImageGenerator(self.seed)
        return super().perturb(x, y)

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The library draws a start for the batch as well, and passes it over for this one."""
        start = x + self.eps * self.normalize(self.draws.draw(SAMPLES[self.norm], x).to(x))
        return super().attack_single_run(x, y, start)


class APGD(_OwnStarts, APGDAttack):
    """APGD on cross-entropy."""


class TargetedAPGD(_OwnStarts, APGDAttack_targeted):
    """APGD on the targeted DLR loss, one target after another."""


# Square (Andriushchenko et al. 2020) without idle queries, for any image size, and through ties


def _starts(height: int, width: int) -> bool:
    """Whether the library can lay out its start for L2: it tiles the image with squares of a fifth of the height.

    Where the tiles leave the image, it fails: sides of 12, 14, 18, 19 and 24 pixels, and below 5.
    """
    tile = height // 5
    offset = (height - 5 * tile) // 2
    return tile == 1 or (tile > 1 and all(offset + side // tile * tile <= side for side in (height, width)))


class Square(SquareAttack):
    """As the library's on each image alone, for images of any size and for models whose logits tie.

    Deviation: in L2, images whose size the library cannot take are padded on the right and below to the next side that it can, and
    cropped before they reach the model. What it spends on the margin is lost: the attack is a little weaker than it could be.

    Deviation: a query that leaves an image as it is, is not put to the model. A model that judges images one by one, and draws nothing,
    would say the same again; one that draws has fewer chances to err.
    """

    _shown: tuple[Tensor, ...] = ()

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.norm == "Linf" or _starts(height, width):
            return super().perturb(x, y)
        side = next(side for side in count(max(height, width)) if _starts(side, side))
        whole = self.predict
        self.predict = lambda images: whole(images[..., :height, :width])
        try:
            return super().perturb(F.pad(x, (0, side - width, 0, side - height)), y)[..., :height, :width]
        finally:
            self.predict = whole

    def random_choice(self, shape: list[int]) -> Tensor:
        """Signs of this shape, the same for all images of a batch, as the library's windows are: no image depends on the rest of the batch.

        The library asks for (C, 1, 1), which all images get, or for (N, C, ...), and only reads what it gets.
        """
        return super().random_choice([1, *shape[1:]]).expand(shape) if len(shape) == 4 else super().random_choice(shape)

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._shown = ()
        try:
            return super().attack_single_run(x, y)
        finally:
            self._shown = ()

    def check_shape(self, x: Tensor) -> Tensor:
        """The library passes here thrice for every query, in this order: the images, the best found for them, what it is about to try."""
        self._shown = (*self._shown[-2:], super().check_shape(x))
        return self._shown[-1]

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Margins and losses (N,) of the tries (N, C, H, W); one that is the best found already, pixel by pixel, is not put to the model.

        Where a window has reached the edge of ball or box, another of the same sign changes nothing: one query in two, late in an attack
        on grey images in L-infinity, fewer in colour. The library keeps the best unless a loss is smaller or a margin at most 0; here both
        are too large.
        """
        if len(self._shown) < 3:  # the start
            return super().margin_and_loss(x, y)
        new = (x != self._shown[1]).flatten(1).any(1)
        if new.all():
            return super().margin_and_loss(x, y)
        margin, loss = x.new_ones(len(x)), x.new_full((len(x),), torch.finfo(x.dtype).max)
        if new.any():
            margin[new], loss[new] = super().margin_and_loss(x[new], y[new])
        return margin, loss

    # The library goes on with no image at all where the first try leaves ties only; its own two functions cannot take that.

    def lp_norm(self, x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1).view(-1, *[1] * self.ndims) if not len(x) else super().lp_norm(x)

    def normalize(self, x: Tensor) -> Tensor:
        return x if not len(x) else super().normalize(x)
