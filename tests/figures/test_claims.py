"""Effects behind the claims, read back from the drawn figure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from advml.claims.claims import CLAIMS
from advml.figures.claims import COLOURS, effects
from advml.figures.style import FULL


def part(name: str, **changes: object) -> dict:
    about = {"name": name, "effect": 0.1, "low": 0.05, "high": 0.2, "side": "above", "bound": 0.02, "claimed": "above 0.02", "paper": 0.3}
    return about | {"verdict": "supported for this seed", "seeds": 1} | changes


def claims() -> list[dict]:
    """The paper's six, with their real sentences and names."""
    return [
        {"claim": claim.sentence, "verdict": "supported", "parts": [part(each.name, bound=each.bound) for each in claim.parts]}
        for claim in CLAIMS
    ]


def test_every_title_lies_inside_the_canvas_and_clear_of_the_others():
    figure = effects(claims())
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [axes._left_title.get_window_extent(renderer) for axes in figure.axes]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [claim.sentence for claim in CLAIMS]
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
    assert max(box.x0 for box in boxes) - min(box.x0 for box in boxes) < 2  # in one column, at the figure's left edge
    assert boxes[0].x0 < 0.03 * figure.bbox.x1
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))


@pytest.mark.parametrize(("suffix", "seeds", "told"), [(" for this seed", 1, " for this seed (1 seed)"), ("", 3, " (3 seeds)")])
def test_the_legend_has_the_words_of_the_verdicts_their_seeds_and_colours_within_the_canvas(suffix, seeds, told):
    parts = [part(word, verdict=f"{word}{suffix}", seeds=seeds) for word in COLOURS]
    figure = effects([{"claim": "a", "verdict": "supported", "parts": parts}])
    (legend,) = figure.legends
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = dict(zip((text.get_text() for text in legend.get_texts()), (line.get_color() for line in legend.get_lines()), strict=True))
    assert {f"{word}{told}": colour for word, colour in COLOURS.items()}.items() <= found.items()
    box = legend.get_window_extent(renderer)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_effect_interval_bound_and_the_papers_figure_are_drawn_where_they_are():
    (axes,) = effects(
        [{"claim": "a", "verdict": "supported", "parts": [part("x", bound=-0.02, verdict="contradicted for this seed")]}]
    ).axes
    bound, interval, effect, paper = axes.get_lines()
    np.testing.assert_allclose(bound.get_xdata(), [-0.02, -0.02])
    np.testing.assert_allclose(interval.get_xdata(), [0.05, 0.2])
    assert list(effect.get_xdata()) == [0.1] and list(paper.get_xdata()) == [0.3]
    assert to_hex(interval.get_color()) == to_hex(effect.get_color()) == COLOURS["contradicted"] and to_hex(paper.get_color()) == FULL


def test_parts_stand_in_their_order_from_above():
    (axes,) = effects([{"claim": "a", "verdict": "supported", "parts": [part("first", effect=0.1), part("second", effect=0.2)]}]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["second", "first"]
    places = {line.get_xdata()[0]: line.get_ydata()[0] for line in axes.get_lines() if line.get_marker() == "o"}
    assert places == {0.1: 1, 0.2: 0}


def test_what_was_not_tested_is_left_out():
    missing = {"name": "z", "side": "above", "bound": 0, "claimed": "above 0", "paper": None, "verdict": "not tested", "missing": "model"}
    found = effects(
        [
            {"claim": claim, "verdict": "not tested", "parts": parts}
            for claim, parts in (("tested", [part("x"), missing]), ("not", [missing]))
        ]
    )
    assert [axes.get_title(loc="left") for axes in found.axes] == ["tested"]
    assert [label.get_text() for label in found.axes[0].get_yticklabels()] == ["x"]
    assert effects([]).axes == []


def test_parts_of_a_claim_that_is_not_tested_have_no_colour_of_a_verdict():
    both = [{"claim": verdict, "verdict": verdict, "parts": [part("x")]} for verdict in ("not tested", "supported for this seed")]
    untested, tested = effects(both).axes
    colours = [[line.get_color() for line in axes.get_lines() if line.get_marker() == "o"] for axes in (untested, tested)]
    assert colours == [[COLOURS["not tested"]], [COLOURS["supported"]]]


@pytest.mark.parametrize("missing", ["low", "paper"])
def test_what_has_no_interval_or_no_figure_of_the_papers_is_drawn_without(missing):
    changes = {"low": None, "high": None} if missing == "low" else {"paper": None}
    (axes,) = effects([{"claim": "a", "verdict": "supported", "parts": [part("x", **changes)]}]).axes
    assert len(axes.get_lines()) == 3
