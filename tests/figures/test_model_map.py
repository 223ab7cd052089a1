"""Maps of models: places that keep distances, and labels that can be read with twelve models and with sixty."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from advml.figures.model_map import MOST_NAMES, model_map, positions
from advml.recipes import REGIMES


def between(places: np.ndarray) -> np.ndarray:
    return np.linalg.norm(places[:, None] - places[None], axis=-1)


def points(models: int) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Clean and attacked, the latter moved; Partial-AT's clean points are those of AT, as its encoder is."""
    names = [f"{scheme}-{regime}-s{seed}" for seed in range(models // 12) for scheme in ("SL", "CL", "SCL") for regime in REGIMES]
    random = np.random.default_rng(0)
    clean = random.normal(size=(models, 4)) * [1, 0.6, 0.2, 0.1]
    clean[2::4] = clean[1::4]
    moved = clean + 0.3 * random.normal(size=clean.shape)
    both = [(name, kind) for kind in ("clean", "adversarial") for name in names]
    return both, between(np.concatenate([clean, moved]))


def test_distances_in_a_plane_are_kept_exactly_and_the_same_every_time():
    places = np.random.default_rng(0).normal(size=(9, 2))
    found, stress = positions(between(places))
    np.testing.assert_allclose(between(found), between(places), atol=1e-4)
    assert stress < 1e-4 and (found == positions(between(places))[0]).all()


def test_stress_says_how_far_a_map_is_from_the_distances():
    corners = np.eye(6) * 2**0.5 / 2  # all at distance 1, which no plane has
    found, stress = positions(between(corners))
    drawn = between(found)
    assert stress == pytest.approx(np.sqrt(np.square(drawn - between(corners)).sum() / np.square(between(corners)).sum())) and stress > 0.2


@pytest.mark.parametrize("models", [12, 60])
def test_labels_do_not_lie_over_one_another_and_name_every_model(models):
    both, distances = points(models)
    figure = model_map(both, distances, title="")
    FigureCanvasAgg(figure).draw()
    axes, names = figure.axes[0], {name for name, _ in both}
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    dots = axes.transData.transform(np.concatenate([each.get_offsets() for each in axes.collections]))
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 for box in boxes)
    assert not any(box.contains(*dot) for box in boxes for dot in dots) and not figure.legends[0].get_window_extent().overlaps(axes.bbox)
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.shrunk(0.9, 0.8).overlaps(other.shrunk(0.9, 0.8))]
    written = [label for text in axes.texts for label in text.get_text().split(", ")]
    if models <= MOST_NAMES:
        assert sorted(written) == sorted(names)
        lines = [axes.transData.transform_path(line.get_path()) for line in axes.lines if line.get_linestyle() == "-"]
        assert len(lines) == models and not any(line.intersects_bbox(box) for line in lines for box in boxes)
        return
    key = dict(text.get_text().split("  ") for text in figure.axes[1].texts)
    assert sorted(written) == sorted(key) and set(key.values()) == names


def test_dead_ends_are_left_out_and_too_few_points_are_no_map():
    both, distances = points(12)
    distances[3] = distances[:, 3] = np.nan
    drawn = model_map(both, distances, title="")
    assert sum(len(each.get_offsets()) for each in drawn.axes[0].collections) == len(both) - 1
    assert model_map(both[:2], distances[:2, :2], title="") is None
