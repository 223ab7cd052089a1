"""Picture of one adversarial example: original, perturbation, result, and the confidences before and after."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from advml.figures.style import ADVERSARIAL, FULL, INK, QUIET, styled

WHEN = ("before", "after")
BEFORE, AFTER = FULL, ADVERSARIAL
TOP = 3  # number of predictions shown, before and after each
LEAST = 0.005  # least confidence that gets a bar
LONGEST_NAME = 16  # letters of a class name that fit beside its bars
SMALL = 160  # pixels; images with shorter sides are enlarged without interpolation, so that every pixel stays visible


@styled
def draw(original: Tensor, adversarial: Tensor, names: list[str], before: Tensor, after: Tensor, result: dict[str, Any]) -> Figure:
    """Draw original + perturbation = adversarial image, with the confidences before and after.

    Args:
        original, adversarial: (1, C, H, W) in [0, 1].
        names: of the K classes.
        before, after: probabilities (K,).
        result: the dict that `attack_demo.attack_figure` returns.
    """
    with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called $5
        figure = Figure(figsize=(8, 2.75), layout="constrained")
        figure.suptitle(result["headline"], x=0.01, ha="left", fontweight="bold", fontsize=11)
        first, second, third, bars = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.15))
        difference = adversarial - original
        scale = 0.5 / (float(difference.abs().max()) or 0.5)
        size = result["size"].replace(", ", "\n") + "\ngrey: no change"
        taken = [f"prediction {quoted(result[f'prediction_{when}'])}\nconfidence {_percent(result[f'confidence_{when}'])}" for when in WHEN]
        _image(first, original, "original", taken[0], BEFORE)
        _image(second, 0.5 + scale * difference, f"perturbation, {scale:.2g} x", size, INK)
        _image(third, adversarial, "adversarial", taken[1], AFTER)
        for axes, sign in ((second, "+"), (third, "=")):
            axes.annotate(sign, (-0.09, 0.5), xycoords="axes fraction", ha="center", va="center", fontsize=15, color=QUIET)
        _bars(bars, names, before, after)
    return figure


def _image(axes: Axes, image: Tensor, title: str, caption: str, colour: str) -> None:
    pixels = image[0].clamp(0, 1).permute(1, 2, 0)
    interpolation = "nearest" if max(pixels.shape[:2]) < SMALL else "auto"
    axes.imshow(pixels.expand(-1, -1, 3).numpy(), interpolation=interpolation)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    axes.set_anchor("N")
    axes.set_title(title, fontsize=9.5)
    axes.set_xlabel(caption, color=colour, fontsize=8.5)


def _bars(axes: Axes, names: list[str], before: Tensor, after: Tensor) -> None:
    """Draw the confidences before and after the attack, for the classes that are among the TOP in either."""
    first, then = (probabilities.topk(min(TOP, len(names))).indices.tolist() for probabilities in (before, after))
    leading = [index for index in dict.fromkeys(first + then) if max(before[index], after[index]) >= LEAST] or first
    for row, index in enumerate(leading):
        for offset, probabilities, colour in ((-0.2, before, BEFORE), (0.2, after, AFTER)):
            share = float(probabilities[index])
            axes.barh(row + offset, share, 0.38, color=colour, label=WHEN[offset > 0] if row == 0 else None)
            axes.annotate(_percent(share), (share, row + offset), (2, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(leading)), [_short(names[index]) for index in leading])
    axes.tick_params(length=0)
    axes.set(xticks=[], xlim=(0, 1.25), ylim=(max(3, len(leading)) - 0.5, -0.5))
    axes.set_title("confidence", fontsize=9.5)
    axes.spines["bottom"].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, 0), ncols=2, handlelength=1, columnspacing=1)


def _percent(share: float) -> str:
    """Percentage as text: `98 %`; values near the ends are `> 99 %` and `< 1 %`, never 100 % or 0 %."""
    return "> 99 %" if share >= 1 - LEAST else "< 1 %" if share < LEAST else f"{100 * share:.0f} %"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def quoted(name: str) -> str:
    return f"'{_short(name)}'"
