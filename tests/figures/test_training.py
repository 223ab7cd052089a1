"""Curves of a training phase hold the numbers they were given, and drawing leaves matplotlib as it was."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
from matplotlib.axes import Axes

from advml.figures import style
from advml.figures.style import to_png
from advml.figures.training import training_curves


def history(metric: str, *, epochs: int = 5, adversarial: bool = True) -> list[dict[str, float]]:
    records = []
    for epoch in range(1, epochs + 1):
        record = {"epoch": epoch, "learning_rate": 1e-3 / epoch, "train/loss": 2 / epoch, f"validation/{metric}": 0.1 * epoch}
        if adversarial:
            record |= {"train/adversarial_loss": 3 / epoch, f"validation/adversarial_{metric}": 0.05 * epoch}
        records.append(record)
    return records


def curves(axes: Axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_curves_of_a_classifier_are_loss_accuracy_and_learning_rate() -> None:
    records = history("accuracy")
    loss, accuracy, rate = training_curves({"CL-Full-AT-s0": (records, None)}).axes
    assert curves(loss) == {
        "train, clean": [record["train/loss"] for record in records],
        "train, adversarial": [record["train/adversarial_loss"] for record in records],
    }
    assert curves(accuracy) == {
        "validation, clean": [record["validation/accuracy"] for record in records],
        "validation, adversarial": [record["validation/adversarial_accuracy"] for record in records],
    }
    assert list(rate.lines[0].get_ydata()) == [record["learning_rate"] for record in records]
    assert [axes.get_title(loc="left") for axes in (loss, accuracy, rate)] == ["loss", "accuracy", "learning rate"]


def test_curves_of_a_contrastive_pretraining_have_no_accuracy() -> None:
    loss, _ = training_curves({"CL-at-s0": (history("loss"), None)}).axes
    assert list(curves(loss)) == ["train, clean", "train, adversarial", "validation, clean", "validation, adversarial"]


KEPT = {"CL-at-s0": 2, "CL-ST-s0": 4}


def test_phases_stand_side_by_side_and_the_kept_epoch_of_each_is_marked_and_named() -> None:
    figure = training_curves({"CL-at-s0": (history("loss"), 2), "CL-ST-s0": (history("accuracy", adversarial=False), 4)})
    titles = [f"{name}   (dotted: epoch {epoch} was kept)" for name, epoch in KEPT.items()]
    assert [part.get_suptitle() for part in figure.subfigs] == titles
    for part, epoch in zip(figure.subfigs, KEPT.values(), strict=True):
        assert all(list(axes.lines[-1].get_xdata()) == [epoch, epoch] for axes in part.axes)


def test_one_epoch_is_a_visible_point_and_none_is_no_error() -> None:
    loss = training_curves({"short": (history("accuracy", epochs=1), None)}).axes[0]
    assert {line.get_marker() for line in loss.lines} == {"o"}
    assert to_png(training_curves({"nothing to learn": ([], None)}))[:4] == b"\x89PNG"


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    with matplotlib.rc_context(dict.fromkeys(("font.size", "savefig.dpi"), 77)):
        before = dict(matplotlib.rcParams)
        figure = training_curves({"title": (history("accuracy"), None)})
        to_png(figure)
        assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].xaxis.label.get_fontsize() == style.STYLE["font.size"]


def test_plots_draw_without_pyplot() -> None:
    code = "import sys, advml.figures.accuracy, advml.figures.training; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]
