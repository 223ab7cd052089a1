"""The four attacks of AutoAttack's standard set, by its library (Croce and Hein 2020, "Reliable evaluation of adversarial robustness").

Cost of an image that no attack breaks, in (forward, backward) passes at the standard strength, for K = 10 and either norm: APGD-CE
(102, 101), APGD-T (919, 909), FAB-T (1828, 900), Square at most (5003, 0), because queries that leave the image unchanged are skipped.
These were counted with a network of two linear layers whose bias for the true class is 100, as the rows of all batches that it
received and of all gradients at its logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
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
from advml.core.device import double
from advml.core.errors import Failure, UserError

NORM_NAMES = {"linf": "Linf", "l2": "L2"}  # key of NORMS -> the library's name
TOLERANCE = 1e-5  # distance outside of ball or box that rounding in the library may cause

# Silences the library, which warns of zero gradients through a logger, or through `warnings` if it gets none.
_SILENT = logging.Logger("advml.attacks.autoattack", level=logging.CRITICAL + 1)


@dataclass(frozen=True)
class Strength:
    """Budget of the attacks; the defaults are AutoAttack's standard.

    Attributes:
        steps: of APGD-CE, and of APGD-T and FAB-T for each target.
        targets: number of target classes of APGD-T and FAB-T, tried one after another; at most K - 1.
        queries: of Square, including those that leave the image unchanged and are skipped.
    """

    steps: int = 100
    targets: int = 9
    queries: int = 5000


class LibraryAttack(Protocol):
    """Interface of the library's attacks."""

    def perturb(self, x: Tensor, y: Tensor, /) -> Tensor: ...


Build = Callable[[nn.Module, Strength, dict[str, Any]], LibraryAttack]  # model, strength (targets <= K - 1), arguments of all attacks


@dataclass(frozen=True)
class Recipe:
    """One of the library's attacks.

    Attributes:
        classes: least number of classes: the targeted DLR loss of APGD-T divides by a difference that involves the fourth largest logit.
        build: constructs it.
    """

    classes: int
    build: Build


# Name in the library -> attack
ATTACKS: dict[str, Recipe] = {
    "apgd-ce": Recipe(2, lambda model, strength, common: APGD(model, loss="ce", n_iter=strength.steps, logger=_SILENT, **common)),
    "apgd-t": Recipe(
        4,
        lambda model, strength, common: TargetedAPGD(
            model, n_iter=strength.steps, n_target_classes=strength.targets, logger=_SILENT, **common
        ),
    ),
    "fab-t": Recipe(
        2,
        lambda model, strength, common: FABAttack_PT(
            model, targeted=True, n_iter=strength.steps, n_target_classes=strength.targets, **common
        ),
    ),
    "square": Recipe(
        2, lambda model, strength, common: Square(model, p_init=0.8, resc_schedule=False, n_queries=strength.queries, **common)
    ),
}


def _recipe(name: str) -> Recipe:
    if name not in ATTACKS:
        raise UserError(f"there is no attack {name!r} of AutoAttack; choose from {', '.join(ATTACKS)}")
    return ATTACKS[name]


def applicable(name: str, classes: int) -> bool:
    """Whether the attack works with this number of classes: APGD-T needs 4, the others 2."""
    return classes >= _recipe(name).classes


def not_run(names: Iterable[str], classes: int) -> dict[str, str]:
    """Those of AutoAttack's attacks among the names that do not work with this number of classes, each with the reason."""
    found = (name for name in names if name in ATTACKS and not applicable(name, classes))
    return {name: f"needs at least {ATTACKS[name].classes} classes, and there are {classes}" for name in found}


def attack(
    name: str, model: nn.Module, images: Tensor, labels: Tensor, *, threat_model: ThreatModel, classes: int, strength: Strength, seed: int
) -> Tensor:
    """Adversarial images of one attack of AutoAttack's standard set.

    An image that the attack breaks is returned perturbed. Every other image is returned unchanged: one that it cannot break, one for
    which it computed NaN, and one that is misclassified from the start.

    If the model is deterministic and processes each image by itself, the result for an image depends on the image and `seed` alone, up
    to rounding, and not on the rest of the batch. On the CPU the result is reproducible.

    During the attack the model is in eval mode and frozen. Afterwards, also after an error, all state is restored: global generators,
    modes, `requires_grad`, gradients, grad mode, trace function, warnings, standard output. No file is written.

    Args:
        name: a key of ATTACKS.
        model: maps float images (N, C, H, W) in [0, 1] to logits (N, K).
        images: (N, C, H, W) in [0, 1], contiguous or channels last; the model gets the same memory format.
        labels: true classes (N,).
        threat_model: ball and box; L-infinity or L2.
        classes: K.
        strength: steps, targets, queries.
        seed: of all random numbers.
    Returns:
        Images (N, C, H, W), detached, inside the threat model.
    Raises:
        UserError: the name is unknown, or the attack needs more classes.
        Failure: the result is outside of ball or box by more than rounding, or the model does not return (N, K).
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
    with isolated(model, seed=seed), torch.no_grad():  # the attacks enable gradients themselves
        found = recipe.build(Logits(model, like=images, classes=classes), strength, common).perturb(inputs, labels.clone())
    found = found.detach().to(images.dtype)
    found = torch.where(found.isfinite().flatten(1).all(1).view(-1, *[1] * (images.ndim - 1)), found, images.detach())
    _require_inside(name, found, images, threat_model)
    return threat_model.project(found, images.detach())


def _require_inside(name: str, found: Tensor, images: Tensor, threat_model: ThreatModel) -> None:
    """Raise Failure unless all images found (N, C, H, W) are in ball and box, up to rounding; computed in double precision."""
    distance = NORMS[threat_model.norm].size(double(found) - double(images.detach()))
    sides = (-found.flatten(1).amin(1), found.flatten(1).amax(1) - 1)
    outside = torch.stack([distance - threat_model.epsilon, *map(double, sides)]).amax(0)
    worst = float(outside.max())  # NaN if any entry is: amax and max propagate it, and the comparison below is then false
    if not worst <= TOLERANCE:
        ball = f"{threat_model.norm} ball of radius {threat_model.epsilon:g}"
        raise Failure(f"the attack {name} left the {ball} or the box [0, 1] by {worst:g}; leave it out, and report its library's version")


# APGD with random starts drawn per image

# Distribution of the library's starts, by its name of the norm, before they are scaled to the surface of the ball.
SAMPLES: dict[str, Sample] = {
    "Linf": NORMS["linf"].sample,
    "L2": lambda like, generator: torch.randn(like.shape, generator=generator),
}


class _OwnStarts:
    """Mix-in that draws the random starts of the library's APGD per image, so that they do not depend on the rest of the batch.

    Equals the library's attack on each image alone with `seed = PerImageGenerator(seed).seed_of(image)`. For L-infinity and L2.
    """

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W) of x in [0, 1] with classes y (N,); those that are not broken are returned unchanged."""
        self.draws = PerImageGenerator(self.seed)
        return super().perturb(x, y)

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the library's loop from this start instead of the one that it draws for the batch."""
        start = x + self.eps * self.normalize(self.draws.draw(SAMPLES[self.norm], x).to(x))
        return super().attack_single_run(x, y, start)


class APGD(_OwnStarts, APGDAttack):
    """APGD on cross-entropy."""


class TargetedAPGD(_OwnStarts, APGDAttack_targeted):
    """APGD on the targeted DLR loss, one target after another."""


# Square (Andriushchenko et al. 2020) without queries that leave the image unchanged, for any image size, and for tied logits


def _starts(height: int, width: int) -> bool:
    """Whether the library's L2 start works for this image size: it tiles the image with squares of a fifth of the height.

    It fails where tiles reach over the edge: for sides of 12, 14, 18, 19 and 24 pixels, and below 5.
    """
    tile = height // 5
    offset = (height - 5 * tile) // 2
    return tile == 1 or (tile > 1 and all(offset + side // tile * tile <= side for side in (height, width)))


class Square(SquareAttack):
    """Square attack that equals the library's on each image alone, for images of any size and for models with tied logits.

    Deviation: in L2, images of a size that the library does not support are padded on the right and below to the next size that it
    does, and cropped before they reach the model. Changes to the padding are wasted, so the attack is a little weaker than possible.

    Deviation: a query that leaves an image unchanged does not reach the model. A deterministic model that processes images one by one
    would give the same logits again; a random model has fewer chances to err.
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
        """Random signs of this shape, the same for all images of a batch, so that no image depends on the rest of the batch.

        The library's windows are the same for all images already. It asks for (C, 1, 1), shared by all images, or for (N, C, ...), and
        does not write to the result.
        """
        return super().random_choice([1, *shape[1:]]).expand(shape) if len(shape) == 4 else super().random_choice(shape)

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._shown = ()
        try:
            return super().attack_single_run(x, y)
        finally:
            self._shown = ()

    def check_shape(self, x: Tensor) -> Tensor:
        """Record the last three arguments: for every query, the library checks the images, their best perturbed versions, and the try."""
        self._shown = (*self._shown[-2:], super().check_shape(x))
        return self._shown[-1]

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Margins and losses (N,) of the tries (N, C, H, W); tries that equal the best found so far do not reach the model.

        At the edge of ball or box, another window of the same sign changes nothing: this concerns one query in two late in an attack on
        grey images in L-infinity, fewer in colour. Such tries get values that the library rejects: it accepts a try only if its loss is
        smaller or its margin at most 0.
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

    # If the first try leaves only ties, the library goes on with an empty batch, which its own versions of these two cannot process.

    def lp_norm(self, x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1).view(-1, *[1] * self.ndims) if not len(x) else super().lp_norm(x)

    def normalize(self, x: Tensor) -> Tensor:
        return x if not len(x) else super().normalize(x)
