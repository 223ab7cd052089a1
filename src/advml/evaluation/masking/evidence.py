"""Measurements of `probe`, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from advml.core.io import without_nan

SHORT = 0.1  # length of a step, in epsilons, over which a gradient should predict the loss


@dataclass(frozen=True)
class Point:
    """One point of the security curve, with a 95 % Wilson interval. Images that are misclassified when clean count as wrong."""

    epsilon: float
    right: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Rise:
    """The most significant rise of the security curve: `regained` samples break only at `smaller`, `lost` ones only at `larger`."""

    smaller: float
    larger: float
    regained: int
    lost: int
    pairs: int  # of epsilons compared


@dataclass(frozen=True)
class Evidence:
    """Measurements of `probe`. Counts refer to the `n` samples (images that are correct when clean), unless stated otherwise.

    Attributes:
        norm, epsilon, steps, seed, classes: of the probes.
        largest_class: share of the images that belong to the most frequent class.
        images: size of the subset; the curve's accuracies are shares of it.
        curve: from epsilon 0 to one at which every image can reach every other, by independent runs of PGD on cross-entropy.
        rise: see `Rise`.
        single_step_only, multi_step_only: samples that one step breaks and S steps do not, and the reverse.
        white_box_right: samples that survive all known white-box attacks.
        black_box: attack -> samples that it breaks although they survive all known white-box attacks.
        zero_clean, zero_random: samples whose gradient of cross-entropy is exactly 0 at the image, at a random point of the ball.
        zero_margin: samples whose gradient of the margin objective is exactly 0 at the image.
        non_finite: samples with NaN or infinity in one of these gradients.
        gradient_error: error message if gradients could not be computed at all; else None.
        margins: best margin so far (largest wrong logit - right logit) after 0 .. S steps, mean over the survivors.
        survivors: samples that plain PGD at `epsilon` does not break.
        slope_kept: gain of a step of epsilon / 10 along the margin's gradient, relative to the first-order prediction; median.
        broken, lost: samples that PGD breaks, and those among them that a fresh copy of the model classifies correctly in other batches.
        batch_difference: largest difference between the outputs of these two, relative to the largest output.
        output_difference: largest difference between the outputs of two equal passes, relative to the largest output.
        predictions_changed: images (of the subset) that these passes classify differently.
        output_low, output_sum, output_sum_spread, output_log_sum_exp: smallest output; mean and range of its sum over classes;
            largest |log sum exp|.
        forward, backward: passes per sample, all probes together.
        figure_broken: images that survive all attacks of the worst case and are broken by these probes (PGD, one step, noise).
    """

    norm: str
    epsilon: float
    steps: int
    seed: int
    classes: int
    largest_class: float
    images: int
    n: int
    curve: tuple[Point, ...]
    rise: Rise
    single_step_only: int
    multi_step_only: int
    white_box_right: int
    black_box: dict[str, int]
    zero_clean: int
    zero_random: int
    zero_margin: int
    non_finite: int
    gradient_error: str | None
    slope_kept: float | None
    margins: tuple[float, ...]
    survivors: int
    broken: int
    lost: int
    batch_difference: float
    output_difference: float
    predictions_changed: int
    output_low: float
    output_sum: float
    output_sum_spread: float
    output_log_sum_exp: float
    forward: float
    backward: float
    figure_broken: int = 0

    def as_record(self) -> dict[str, Any]:
        """Plain containers for JSON, in which numbers that are not finite are None."""
        return without_nan(asdict(self))
