"""Map of models: multidimensional scaling of the distances between their representations, clean and attacked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.manifold import smacof

from advml.figures.style import ADVERSARIAL, FULL, INK, QUIET, styled

MOST_NAMES = 15  # up to this number, names are written beside points; beyond it, numbers with a key
KEY_ROWS = 24  # rows per column of the key
RINGS = 40  # of places around a point, where its label may be
DETOUR = 10  # number of rings that a label moves away at most, so that no line crosses it
CLEARANCE = 4  # around a point, and beside a label, in pixels


def positions(distances: np.ndarray) -> tuple[np.ndarray, float]:
    """Positions (K, 2) in the plane whose distances approximate `distances` (K, K), and Kruskal's stress: 0 exact, 0.2 poor.

    SMACOF (de Leeuw 1977), started from the classical solution (Torgerson 1952) and hence deterministic. The orientation has no meaning;
    it is fixed by putting the first point on the left, the second below (unless all are on a line).
    """
    count = len(distances)
    centring = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-centring @ np.square(distances) @ centring / 2)
    start = (vectors[:, :-3:-1] if count > 1 else np.zeros((1, 2))) * np.sqrt(np.clip(values[:-3:-1], 0, None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of changing defaults, all of which are set here
        found, _ = smacof(distances, n_components=2, init=start, n_init=1, normalized_stress=False)
    found = found - found.mean(0)
    found = found * np.where(found[0] > 0, -1, 1)
    between = np.linalg.norm(found[:, None] - found[None], axis=-1)
    total = np.square(distances).sum()
    return found, float(np.sqrt(np.square(between - distances).sum() / total)) if total else 0.0


@styled
def model_map(points: Sequence[tuple[str, str]], distances: np.ndarray, *, title: str) -> Figure | None:
    """Draw a point per model and kind of input, with a line from clean to attacked; None if fewer than three points have distances.

    Args:
        points: (model, kind of input), in the order of rows and columns.
        distances: (K, K); NaN for dead layers.
    """
    whole = np.isfinite(distances).any(1)
    kept = [point for point, yes in zip(points, whole, strict=True) if yes]
    if len(kept) < 3:
        return None
    found, stress = positions(distances[np.ix_(whole, whole)])
    places = dict(zip(kept, found, strict=True))
    models = list(dict.fromkeys(model for model, _ in kept))
    few = len(models) <= MOST_NAMES
    columns = 0 if few else -(-len(models) // KEY_ROWS)
    figure = Figure(figsize=(7.2 + 1.5 * columns, 5.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)  # inches, for a number at the end of the axis
    axes = figure.subplots(1, 2, width_ratios=[7.2, 1.5 * columns])[0] if columns else figure.subplots()
    kinds = ("clean", "adversarial"), ("adversarial", "clean")  # of each end of a line, or the other one if its layer is dead
    lines = [[places.get((model, kind), places.get((model, other))) for kind, other in kinds] for model in models]
    for line in lines:
        axes.plot(*np.transpose(line), color=QUIET, linewidth=0.8, alpha=0.6, zorder=1)
    for kind, marker, colour in (("clean", "o", FULL), ("adversarial", "X", ADVERSARIAL)):
        chosen = [places[point] for point in kept if point[1] == kind]
        if chosen:
            axes.scatter(*np.transpose(chosen), marker=marker, s=34, color=colour, label=kind, zorder=2, edgecolor="white", linewidth=0.4)
    labels = {model: model if few else str(number) for number, model in enumerate(models, 1)}
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.2)
    axes.set_title(title, loc="left")
    axes.set_xlabel(f"distance in radians; stress {stress:.2f}")
    axes.set_ylabel("distance in radians")
    axes.tick_params(labelsize=7)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    together: dict[tuple[float, ...], list[str]] = {}  # models with the same clean point, as with a frozen encoder
    for model, (place, _) in zip(models, lines, strict=True):
        together.setdefault(tuple(place.round(6)), []).append(labels[model])
    if columns:
        _key(figure.axes[1], [f"{labels[model]}  {model}" for model in models])
    figure.draw_without_rendering()  # sets layout and limits, and with them the places in pixels
    _name(axes, {", ".join(names): place for place, names in together.items()}, found, np.array(lines))
    return figure


def _name(axes: Axes, names: dict[str, tuple[float, ...]], points: np.ndarray, lines: np.ndarray) -> None:
    """Place labels inside the axes, without overlap, near to their points, and a little further away if a line would run through them.

    Distant ones are joined to their points by dotted lines.

    Args:
        names: label -> place of its point.
        points: (N, 2) places that labels must not cover.
        lines: (M, 2, 2) places of both ends.
    """
    to_pixels, to_fraction = axes.transData.transform, axes.transAxes.inverted().transform
    dots, segments = to_pixels(points), to_pixels(lines.reshape(-1, 2)).reshape(-1, 2, 2)
    taken = np.hstack([dots - CLEARANCE, dots + CLEARANCE])  # (N, 4) boxes: left, lower, right, upper
    ring, turn = np.meshgrid(np.arange(1, RINGS), np.arange(16) * np.pi / 8, indexing="ij")
    ring, towards = ring.ravel(), np.stack([np.cos(turn), np.sin(turn)], -1).reshape(-1, 2).round(6)
    for label, place in sorted(names.items(), key=lambda item: item[1]):
        text = axes.text(0, 0, label, fontsize=7, color=INK, va="bottom", zorder=3, transform=axes.transAxes)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
        size = np.add(text.get_window_extent().size, [CLEARANCE, 0])
        # The near side of a box, at its left or right end, is on the ring
        low = to_pixels(place) + 0.8 * ring[:, None] * size[1] * towards - size * [0, 0.5] - np.outer(towards[:, 0] < 0, size * [1, 0])
        boxes = np.hstack([low, low + size])
        free = (low >= axes.bbox.min).all(1) & (low + size <= axes.bbox.max).all(1) & ~_overlaps(boxes, taken)
        best = np.where(free, ring + DETOUR * _crossed(boxes, segments), np.inf).argmin()
        taken = np.vstack([taken, boxes[best]])
        text.set_position(to_fraction(np.add(low[best], [CLEARANCE / 2, 0])))
        if ring[best] > 1:
            ends = to_fraction([to_pixels(place), to_pixels(place).clip(low[best], low[best] + size)])
            leader = Line2D(*ends.T, color=QUIET, linewidth=0.7, linestyle=":", zorder=1, transform=axes.transAxes)
            axes.add_artist(leader)  # `plot` would change the limits


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which boxes (K, 4) overlap with any of `others` (N, 4)."""
    apart = (boxes[:, None, :2] >= others[:, 2:]) | (boxes[:, None, 2:] <= others[:, :2])
    return ~apart.any(-1).all(-1)


def _crossed(boxes: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Which boxes (K, 4) are crossed by any of the segments (N, 2, 2), by the slab method (Kay and Kajiya 1986)."""
    starts, steps = segments[:, 0], np.diff(segments, axis=1)[:, 0] + 1e-9
    ends = np.sort((boxes.reshape(-1, 1, 2, 2) - starts[:, None]) / steps[:, None], axis=2)  # (K, N, entry and exit, x and y)
    return (np.maximum(ends[:, :, 0].max(-1), 0) <= np.minimum(ends[:, :, 1].min(-1), 1)).any(-1)


def _key(axes: Axes, lines: Sequence[str]) -> None:
    axes.axis("off")
    columns = -(-len(lines) // KEY_ROWS)
    for number, line in enumerate(lines):
        column, row = divmod(number, KEY_ROWS)
        axes.text(column / columns, 1 - row / KEY_ROWS, line, fontsize=7, va="top", transform=axes.transAxes)
