"""The measurements of `probe`, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from advml.core.io import without_nan

SHORT = 0.1  # of epsilon: the step over which a gradient should predict the loss


@dataclass(frozen=True)
class Point:
    """One point of the security curve. Images that are wrong when clean count as wrong; the interval is Wilson's, 95 %."""

    epsilon: float
    right: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Rise:
    """The rise of the curve that chance explains least: `regained` samples break at `smaller` alone, `lost` ones at `larger` alone."""

    smaller: float
    larger: float
    regained: int
    lost: int
    pairs: int  # of epsilons compared


@dataclass(frozen=True)
class Evidence:
    """What `probe` measured. Counts are of the `n` samples that the clean model gets right, unless stated.

    Attributes:
        norm, epsilon, steps, seed, classes: of the probes.
        largest_class: share of the images that belong to the most frequent class.
        images: size of the subset; the curve's accuracies are shares of it.
        curve: from epsilon 0 up to one at which every image can reach every other, by independent runs of PGD on cross-entropy.
        rise: see `Rise`.
        single_step_only, multi_step_only: samples that one step breaks and S don't, and the reverse.
        white_box_right: samples that survive all white-box attacks known.
        black_box: attack -> samples that it breaks although they survive those.
        zero_clean, zero_random: samples whose gradient of cross-entropy is exactly 0 at the image, at a random point of the ball.
        zero_margin: the same for the margin objective, at the image.
        non_finite: samples with NaN or infinity in one of these gradients.
        gradient_error: the reason given for having no gradient at all, or None.
        margins: best margin so far (largest wrong logit - right logit) after 0 .. S steps, mean over the survivors.
        survivors: samples that plain PGD at `epsilon` does not break.
        slope_kept: what a step of epsilon / 10 along the margin's gradient gains, as a share of what the gradient promises; median.
        broken, lost: samples that PGD breaks, and those of them that a fresh copy of the model gets right in other batches.
        batch_difference: largest difference between the outputs of these two, relative to the largest output.
        output_difference: largest difference between the outputs of two equal passes, relative to the largest output.
        predictions_changed: images (of the subset) that these passes classify differently.
        output_low, output_sum, output_sum_spread, output_log_sum_exp: smallest output; mean and range of its sum over classes;
            largest |log sum exp|.
        forward, backward: passes per sample, all probes together.
        figure_broken: images that survive all attacks of the worst case, and that these probes (PGD, one step, noise) break.
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
        """For JSON: plain containers; numbers that are not finite become None."""
        return without_nan(asdict(self))
