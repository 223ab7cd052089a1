"""The Square Attack of the AutoAttack library (Andriushchenko et al. 2020), without idle queries, for any image size, and through ties."""

from __future__ import annotations

from itertools import count

import torch
import torch.nn.functional as F
from pyautoattack.square import SquareAttack
from torch import Tensor


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
        """Signs of this shape, the same for all images of a batch, as the library's windows are: company decides nothing about an image.

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
