"""Figure of transfer: accuracy of each model on adversarial examples of every other, a matrix of numbers per seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from advml.figures.style import ADVERSARIAL, INK, NORM_NAMES, QUIET, styled

COLOURS = "cividis"
CELL = 0.5  # inches
CLEAN = "clean images"


@styled
def transfer_matrices(blocks: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the accuracy in % of the column's model on images attacked on the row's model; last row: on clean images.

    Framed: a model on its own adversarial images. Orange: flagged models, because images of others break images that survive their own
    attacks.

    Args:
        blocks: one per seed: `seed`, `models` (M names), `accuracy` (M x M in [0, 1], [source][target]), `clean` (M),
            `attacks` (M records with `norm`, `epsilon`), `flags` (each with `model`).
    """
    most = max(len(block["models"]) for block in blocks)
    figure = Figure(figsize=(max(5.4, CELL * most + 2.4), (CELL * (most + 1) + 1.75) * len(blocks) + 0.75), layout="constrained")
    title = f"Transfer of attacks: accuracy in % of each column's model\non images attacked on each row's model ({_threat(blocks)})"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
    for axes, block in zip(figure.subplots(len(blocks), 1, squeeze=False)[:, 0], blocks, strict=True):
        _matrix(axes, block)
        if len(blocks) > 1:
            axes.set_title(f"seed {block['seed']}", loc="left")
    return figure


def _threat(blocks: Sequence[Mapping[str, Any]]) -> str:
    found = {(attack["norm"], f"{attack['epsilon']:.4g}") for block in blocks for attack in block["attacks"]}
    (norm, epsilon), *others = sorted(found)
    return "attacks of different size: see transfer.json" if others else rf"{NORM_NAMES[norm]}, $\epsilon$ = {epsilon}"


def _matrix(axes: Axes, block: Mapping[str, Any]) -> None:
    names, colours = block["models"], matplotlib.colormaps[COLOURS]
    shares = np.array([*block["accuracy"], block["clean"]])
    axes.imshow(shares, vmin=0, vmax=1, cmap=colours, aspect="equal")
    for (line, column), share in np.ndenumerate(shares):
        axes.text(column, line, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink(colours, share))
    for place in range(len(names)):
        axes.add_patch(Rectangle((place - 0.44, place - 0.44), 0.88, 0.88, fill=False, edgecolor="white", linewidth=2.6))
        axes.add_patch(Rectangle((place - 0.44, place - 0.44), 0.88, 0.88, fill=False, edgecolor=INK, linewidth=1.2))
    axes.axhline(len(names) - 0.5, color="white", linewidth=5)
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) + 0.5, -0.5))
    axes.set_yticks(range(len(names) + 1), [*names, CLEAN])
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    flagged = {flag["model"] for flag in block["flags"]}
    for label, name in zip(axes.get_xticklabels(), names, strict=True):
        if name in flagged:
            label.set(color=ADVERSARIAL, fontweight="bold")
    axes.set_ylabel("attacked model (source)")
    axes.set_xlabel("classifying model (target); framed: its own images" + ("; orange: flagged" if flagged else ""), color=QUIET)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)


def ink(colours: Colormap, share: float) -> str:
    """Colour of text on a cell: white on dark cells, dark on light ones."""
    red, green, blue, _ = colours(share)
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "white"
