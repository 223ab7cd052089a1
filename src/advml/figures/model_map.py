"""Map of models: multidimensional scaling of the distances between their representations, clean and attacked."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import smacof

from advml.figures.style import ADVERSARIAL, FULL, INK, QUIET, styled

MOST_NAMES = 15  # up to this number, names are written beside points; beyond it, numbers with a key
KEY_ROWS = 24  # rows per column of the key


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
    axes = figure.subplots(1, 2, width_ratios=[7.2, 1.5 * columns])[0] if columns else figure.subplots()
    for model in models:
        both = [places[model, kind] for kind in ("clean", "adversarial") if (model, kind) in places]
        axes.plot(*np.transpose(both), color=QUIET, linewidth=0.8, alpha=0.6, zorder=1)
    for kind, marker, colour in (("clean", "o", FULL), ("adversarial", "X", ADVERSARIAL)):
        chosen = [places[point] for point in kept if point[1] == kind]
        if chosen:
            axes.scatter(*np.transpose(chosen), marker=marker, s=34, color=colour, label=kind, zorder=2, edgecolor="white", linewidth=0.4)
    labels = {model: model if few else str(number) for number, model in enumerate(models, 1)}
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.2)
    axes.set_title(title, loc="left")
    axes.set_xlabel(f"distance in radians; stress {stress:.2f}")
    axes.tick_params(labelsize=7)
    axes.legend(loc="best", fontsize=8)
    together: dict[tuple[float, ...], list[str]] = {}  # models with the same clean point, as with a frozen encoder
    for model in models:
        place = places.get((model, "clean"), places.get((model, "adversarial")))
        together.setdefault(tuple(place.round(6)), []).append(labels[model])
    _name(axes, {", ".join(names): np.array(place) for place, names in together.items()}, list(places.values()))
    if columns:
        _key(figure.axes[1], [f"{labels[model]}  {model}" for model in models])
    return figure


def _name(axes: Axes, names: dict[str, np.ndarray], points: list[np.ndarray]) -> None:
    """Place labels as near to their points as possible without overlap; distant ones are joined to their points by lines."""
    x, y = np.transpose(points)
    height = 0.028 * max(np.ptp(x), 1.3 * np.ptp(y), 1e-9)
    boxes = [(px - height / 4, py - height / 4, px + height / 4, py + height / 4) for px, py in points]
    for label, (px, py) in sorted(names.items(), key=lambda item: tuple(item[1])):
        width = (0.5 * len(label) + 0.3) * height
        for ring, turn in itertools.product(range(1, 40), range(16)):
            across, up = 0.8 * ring * height * np.cos(np.pi * turn / 8), 0.8 * ring * height * np.sin(np.pi * turn / 8)
            left = px + across - (0 if across >= 0 else width)
            box = (left, py + up - height / 2, left + width, py + up + height / 2)
            if not any(box[0] < right and start < box[2] and box[1] < top and low < box[3] for start, low, right, top in boxes):
                break
        boxes.append(box)
        line = {"arrowprops": {"arrowstyle": "-", "color": QUIET, "linewidth": 0.4, "shrinkB": 0}} if ring > 1 else {}
        axes.annotate(label, (px, py), xytext=(left, py + up), fontsize=7, color=INK, va="center", zorder=3, **line)


def _key(axes: Axes, lines: Sequence[str]) -> None:
    axes.axis("off")
    columns = -(-len(lines) // KEY_ROWS)
    for number, line in enumerate(lines):
        column, row = divmod(number, KEY_ROWS)
        axes.text(column / columns, 1 - row / KEY_ROWS, line, fontsize=7, va="top", transform=axes.transAxes)
