"""The chart of all models shows the numbers it was given, whatever rows there are, and marks what must not be taken as it stands."""

from __future__ import annotations

import io
import itertools
import math

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from advml.evaluation.metrics import wilson
from advml.figures.accuracy import MEASURES, accuracy_chart
from advml.figures.style import ADVERSARIAL, MEANING, STYLE, mark, to_png

METRICS = [measure.metric for measure in MEASURES]
SHARES = {"SL": (0.99, 0.9, 0.7), "CL": (0.98, 0.5, 0.01), "SCL": (1.0, 0.6, 0.0)}


def row(scheme: str, regime: str, *, seed: int = 0, shares: tuple[float, ...] = (0.9, 0.6, 0.3), n: int = 360) -> dict:
    flat = {"model": f"{scheme}-{regime}-s{seed}", "scheme": scheme, "regime": regime, "seed": seed, "diagnostics/flags": 0}
    for metric, share in zip(METRICS, shares, strict=True):
        low, high = wilson(round(share * n), n)
        flat |= {metric: share, f"{metric}/low": low, f"{metric}/high": high}
    return flat


def grid(seeds: int = 1) -> list[dict]:
    regimes = ("Full-AT", "Partial-AT", "AT", "ST")  # not the chart's order
    return [row(s, r, seed=k, shares=SHARES[s]) for k in range(seeds) for s in ("SCL", "CL", "SL") for r in regimes]


def bars(axes: Axes) -> list[tuple[float, float]]:
    """(centre, height) of the bars, from left to right."""
    return sorted((patch.get_x() + patch.get_width() / 2, patch.get_height()) for patch in axes.patches)


def whiskers(axes: Axes) -> list[tuple[float, float]]:
    """(low, high) of the intervals, from left to right."""
    segments = [bar[2][0].get_segments()[0] for bar in axes.containers if hasattr(bar, "has_yerr")]
    return [(segment[0][1], segment[1][1]) for segment in sorted(segments, key=lambda segment: segment[0][0])]


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in sorted(axes.texts, key=lambda text: text.xy[0])]


def test_panels_are_schemes_and_groups_are_regimes_in_the_order_of_the_study() -> None:
    figure = accuracy_chart(grid())
    assert [axes.get_title(loc="left").partition(":")[0] for axes in figure.axes] == ["SL", "CL", "SCL"]
    for axes in figure.axes:
        assert [label.get_text().replace("\n", "") for label in axes.get_xticklabels()] == ["ST", "AT", "Partial-AT", "Full-AT"]


def test_every_bar_is_as_high_as_its_accuracy_and_carries_its_interval() -> None:
    figure = accuracy_chart([row("SL", "ST", shares=(0.99, 0.55, 0.09)), row("SL", "Full-AT", shares=(0.98, 0.9, 0.8))])
    (axes,) = figure.axes
    assert [height for _, height in bars(axes)] == pytest.approx([99, 55, 9, 98, 90, 80])
    centres = [centre for centre, _ in bars(axes)]
    assert centres[1::3] == pytest.approx([0, 1])  # groups stand on their labels
    assert labels(axes) == ["99", "55", "9", "98", "90", "80"]
    expected = [[100 * end for end in wilson(round(share * 360), 360)] for share in (0.99, 0.55, 0.09, 0.98, 0.9, 0.8)]
    assert whiskers(axes) == [pytest.approx(ends) for ends in expected]
    assert "95 % intervals" in axes.get_ylabel()


def test_bars_of_one_measure_share_the_colour_of_the_legend() -> None:
    figure = accuracy_chart(grid())
    legend = {text.get_text(): to_rgb(patch.get_facecolor()) for patch, text in zip(*_legend(figure), strict=True)}
    assert list(legend) == ["clean images", "threat model II", "worst case over all attacks"]
    colours = [to_rgb(patch.get_facecolor()) for patch in sorted(figure.axes[0].patches, key=lambda patch: patch.get_x())]
    assert colours == list(legend.values()) * 4


def _legend(figure) -> tuple[list, list]:
    (legend,) = figure.legends
    return legend.get_patches(), legend.get_texts()


def test_the_legend_of_one_scheme_fits_into_its_narrow_figure() -> None:
    figure = accuracy_chart([row("CL", "AT")], threat_model="8/255 (L-infinity)")
    figure.draw_without_rendering()
    inside = figure.bbox.padded(1)
    assert all(inside.contains(*corner) for corner in figure.legends[0].get_window_extent().corners())


FLAGGED, UNJUDGED = {"diagnostics/flags": 2}, {"diagnostics/flags": None}


def marked(base: dict, changes: dict) -> dict:
    """A row with other flags; None: nobody has looked."""
    return {key: value for key, value in (base | changes).items() if value is not None}


@pytest.mark.parametrize("share", [0.5, 0.02])
@pytest.mark.parametrize(
    ("seeds", "sign"),
    [
        ([{}], ""),
        ([FLAGGED], "!"),
        ([{"transfer/flags": 1}], "!"),
        ([UNJUDGED], "?"),
        ([UNJUDGED, FLAGGED], "!"),
        ([{}, UNJUDGED], "?"),
    ],
)
def test_the_worst_case_of_a_doubtful_model_bears_its_mark_and_the_mark_is_explained(seeds, sign, share):
    doubtful = [marked(row("CL", "AT", seed=k, shares=(0.9, 0.6, share)), changes) for k, changes in enumerate(seeds)]
    figure = accuracy_chart([row("CL", "ST"), *doubtful])
    signs = [text for text in figure.axes[0].texts if text.get_text() in MEANING]
    assert [text.get_text() for text in signs] == [sign] * bool(sign)
    for text in signs:
        assert text.get_color() == ADVERSARIAL and text.xy[0] == pytest.approx(bars(figure.axes[0])[-1][0]) and text.xy[1] >= 100 * share
    told = figure.get_supxlabel()
    assert all((meaning in told) == (each in {mark(found) for found in doubtful}) for each, meaning in MEANING.items())


def test_several_seeds_are_a_mean_with_a_point_for_each() -> None:
    figure = accuracy_chart([row("CL", "AT", seed=k, shares=(0.9, 0.6, share)) for k, share in enumerate((0.2, 0.4, 0.6))])
    (axes,) = figure.axes
    assert bars(axes)[2][1] == pytest.approx(40)
    points = [list(line.get_ydata()) for line in axes.lines]
    assert points[2] == pytest.approx([20, 40, 60])
    assert whiskers(axes) == []
    assert "seeds" in axes.get_ylabel()


@pytest.mark.parametrize("missing", [math.nan, None])
def test_what_was_not_measured_is_left_out(missing: float | None) -> None:
    incomplete = row("SL", "ST")
    if missing is None:
        del incomplete["accuracy/threat_model_2"]
    else:
        incomplete["accuracy/threat_model_2"] = missing
    figure = accuracy_chart([incomplete, row("CL", "AT")])
    assert [len(axes.patches) for axes in figure.axes] == [2, 3]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["AT"]


def test_certain_success_and_failure_have_intervals_too() -> None:
    (axes,) = accuracy_chart([row("SL", "ST", shares=(1.0, 0.5, 0.0), n=7)]).axes
    assert whiskers(axes)[0] == pytest.approx((100 * wilson(7, 7)[0], 100))
    assert whiskers(axes)[2] == pytest.approx((0, 100 * wilson(0, 7)[1]))


def test_a_scheme_of_ones_own_gets_a_panel_after_the_others() -> None:
    figure = accuracy_chart([row("MAE", "ST"), row("MAE", "Warm"), row("SL", "ST")])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["SL: supervised", "MAE"]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["ST", "Warm"]


def test_the_same_rows_give_the_same_bytes_at_the_width_of_a_readme() -> None:
    first, second = to_png(accuracy_chart(grid())), to_png(accuracy_chart(grid()))
    assert first == second
    assert int.from_bytes(first[16:20], "big") == 1600  # the width in a PNG's header: twice what a README shows


def test_one_drawing_gives_the_bytes_of_matplotlibs_two() -> None:
    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        accuracy_chart(grid()).savefig(stream, format="png", metadata={"Software": None})
    assert to_png(accuracy_chart(grid())) == stream.getvalue()


def test_colours_stay_apart_in_grey() -> None:
    def lightness(colour: str) -> float:
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True))

    levels = sorted([1.0, *(lightness(measure.colour) for measure in MEASURES)])  # 1: the background
    assert min(high - low for low, high in itertools.pairwise(levels)) > 0.15
