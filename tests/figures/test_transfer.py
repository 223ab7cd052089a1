"""The matrix of transferred attacks: every number in its cell, a panel per seed, flagged models in orange."""

from __future__ import annotations

from matplotlib.colors import to_hex

from advml.figures.style import ADVERSARIAL, to_png
from advml.figures.transfer import CLEAN, transfer_matrices

NAMES = ["SL-ST-s0", "CL-AT-s0", "SCL-Full-AT-s0"]


def block(*, seed: int = 0, epsilons: tuple[float, ...] = (0.1, 0.1, 0.1), flagged: tuple[str, ...] = ()) -> dict:
    return {
        "seed": seed,
        "models": NAMES,
        "accuracy": [[0.01, 0.12, 0.23], [0.34, 0.45, 0.56], [0.67, 0.78, 0.89]],
        "clean": [0.97, 0.98, 1.0],
        "attacks": [{"norm": "linf", "epsilon": epsilon} for epsilon in epsilons],
        "flags": [{"model": name} for name in flagged],
    }


def test_every_number_stands_in_its_cell_with_sources_down_and_targets_across():
    (axes,) = transfer_matrices([block()]).axes
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    shares = [*block()["accuracy"], block()["clean"]]
    assert cells == {(line, column): f"{100 * share:.0f}" for line, row in enumerate(shares) for column, share in enumerate(row)}
    assert [label.get_text() for label in axes.get_yticklabels()] == [*NAMES, CLEAN]
    assert [label.get_text() for label in axes.get_xticklabels()] == NAMES
    assert "source" in axes.get_ylabel() and "target" in axes.get_xlabel()


def test_the_diagonal_is_framed():
    (axes,) = transfer_matrices([block()]).axes
    corners = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]
    assert {(round(x + width / 2, 6), round(y + height / 2, 6)) for x, y, width, height in corners} == {(0, 0), (1, 1), (2, 2)}


def test_a_flagged_model_is_orange_and_explained():
    (axes,) = transfer_matrices([block(flagged=("CL-AT-s0",))]).axes
    assert [to_hex(label.get_color()) == ADVERSARIAL for label in axes.get_xticklabels()] == [False, True, False]
    assert "flagged" in axes.get_xlabel()
    assert "flagged" not in transfer_matrices([block()]).axes[0].get_xlabel()


def test_seeds_have_panels_and_the_title_says_what_is_shown():
    figure = transfer_matrices([block(seed=0), block(seed=4)])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["seed 0", "seed 4"]
    assert "attacked on each row's model (L-infinity, $\\epsilon$ = 0.1)" in figure.get_suptitle()
    assert "different size" in transfer_matrices([block(epsilons=(0.1, 0.1, 0.2))]).get_suptitle()


def test_nothing_leaves_the_canvas_and_the_same_numbers_give_the_same_bytes():
    figure = transfer_matrices([block()])
    figure.draw_without_rendering()
    inside = figure.bbox.padded(1)
    parts = [figure._suptitle, *figure.axes[0].get_xticklabels(), *figure.axes[0].get_yticklabels(), figure.axes[0].xaxis.label]
    assert all(inside.contains(*corner) for part in parts for corner in part.get_window_extent().corners())
    assert to_png(transfer_matrices([block()])) == to_png(transfer_matrices([block()]))
