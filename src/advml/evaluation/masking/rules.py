"""Rules of the gradient-masking checks, and the flags that they raise.

A rule returns its finding and a remedy, or None. Counts are tested exactly, so that no rule fires on differences that chance explains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from advml.attacks.pgd import default_step_size
from advml.evaluation.intervals import binomial_tail, wilson
from advml.evaluation.masking.evidence import SHORT, Evidence
from advml.evaluation.records import AT_CHANCE

Finding = tuple[str, str]  # what was seen, in numbers; what to try

SIGNIFICANCE = 0.01  # a rule fires if chance alone would produce the finding less often than this
TOLERATED = 0.01  # share of samples on which a weaker attack may succeed by luck, or rounding may change a verdict
CHANCE_FLOOR = 0.05  # accuracy at the largest epsilon up to which `curve_above_chance` never fires, for many classes
DEAD_SHARE = 0.05  # largest accepted share of samples with a gradient of exactly zero
STILL_RISING = 0.6  # largest accepted pace of the margin in the last tenth of the steps, relative to its mean pace over all steps
FEWEST_SURVIVORS = 5  # least number of samples for a mean margin
SLOPE_KEPT = 0.25  # least accepted gain over a short step, relative to the gradient's prediction (unmasked models: above 0.9)
INDEPENDENT = 0.02  # relative difference of outputs in another batch that bf16 can explain
REPEATABLE = 1e-4  # relative difference of two equal passes that float32 and parallel sums can explain
SAME = 1e-3  # relative spread of row sums, or size of log sum exp, that rounding can explain


def _beyond_chance(more: int, fewer: int) -> bool:
    """One-sided sign test: whether `more` against `fewer` disagreeing samples is significant."""
    return binomial_tail(more, more + fewer, share=0.5) < SIGNIFICANCE


def beyond_tolerance(count: int, n: int) -> bool:
    """Whether `count` of `n` is significantly more than a share of TOLERATED."""
    return binomial_tail(count, n, share=TOLERATED) < SIGNIFICANCE


def curve_not_monotone(e: Evidence) -> Finding | None:
    """Fires if accuracy rises with epsilon, although a larger ball contains the smaller one (sign test, Bonferroni over pairs)."""
    rise = e.rise
    if binomial_tail(rise.regained, rise.regained + rise.lost, share=0.5) * rise.pairs >= SIGNIFICANCE:
        return None
    return (
        f"accuracy rises with epsilon: {rise.regained} of {e.n} samples break at {rise.smaller:.4g} but not at {rise.larger:.4g}, "
        f"{rise.lost} the other way round",
        "more steps and restarts, starting from the adversarial images of the smaller epsilon; report the worst result of all",
    )


def curve_above_chance(e: Evidence) -> Finding | None:
    """Fires if accuracy exceeds chance at an epsilon at which every image can become every other.

    Chance is the accuracy of always predicting the most frequent class, at least 1 / K. Never fires below CHANCE_FLOOR.
    """
    last, chance = e.curve[-1], max(1 / e.classes, e.largest_class)
    if binomial_tail(last.right, e.images, share=max(chance, CHANCE_FLOOR)) >= SIGNIFICANCE:
        return None
    return (
        f"accuracy is still {last.accuracy:.3f} (at least {last.low:.3f}) at epsilon {last.epsilon:.4g}, where every image can become "
        f"every other; chance is {chance:.3g}",
        "the attack fails there, the model is not robust: check gradients, attack the margin or DLR objective, use Square or more steps",
    )


def single_step_stronger(e: Evidence) -> Finding | None:
    """Fires if one step (FGSM) breaks more samples than many steps of PGD (sign test)."""
    if not _beyond_chance(e.single_step_only, e.multi_step_only):
        return None
    return (
        f"one step (FGSM) breaks {e.single_step_only} of {e.n} samples that {e.steps} steps of PGD do not, "
        f"{e.multi_step_only} the other way round",
        "smaller steps and more restarts, and PGD from FGSM's images: close to the image, gradients are misleading",
    )


def figure_too_high(e: Evidence) -> Finding | None:
    """Fires if the cheap probes break samples that survive all attacks of the worst case; these are then counted as broken."""
    if not beyond_tolerance(e.figure_broken, e.n):
        return None
    return (
        f"{e.figure_broken} of {e.n} samples survive all attacks of the worst case, but not {e.steps} steps of PGD, one step, or noise; "
        "they are counted as broken; the other test images were not probed",
        "a stronger attack in evaluate (step_size: null, more steps, a random start), and all attacks in worst_case",
    )


def black_box_stronger(e: Evidence) -> Finding | None:
    """Fires if attacks without gradients break more than TOLERATED of the samples that survive all white-box attacks."""
    stronger = {name: count for name, count in e.black_box.items() if beyond_tolerance(count, e.n)}
    if not stronger:
        return None
    listed = ", ".join(f"{name} {count}" for name, count in stronger.items())
    return (
        f"attacks without gradients break samples that survive all white-box attacks: {listed} of {e.n} ({e.white_box_right} survive)",
        "gradients are misleading: more queries for Square, and white-box attacks with a smooth substitute for the masking layer (BPDA)",
    )


def dead_gradients(e: Evidence) -> Finding | None:
    """Fires if gradients are exactly zero on more than DEAD_SHARE of the samples, or not finite on any, so that attacks cannot use them."""
    zero = max(e.zero_clean, e.zero_random)
    if zero <= DEAD_SHARE * e.n and not e.non_finite:
        return None
    saw = (
        f"of {e.n} samples the gradient of cross-entropy is exactly zero for {e.zero_clean} at the image and {e.zero_random} at a random "
        f"point nearby; not finite for {e.non_finite}"
    )
    if e.gradient_error:
        saw += f"; error message: {e.gradient_error}"
    saturated = zero > DEAD_SHARE * e.n and e.zero_margin <= DEAD_SHARE * e.n
    return saw, (
        f"the loss is saturated, the margin is not (zero for {e.zero_margin}): attack the margin or DLR objective, or divide the logits "
        "by their scale"
        if saturated
        else "a layer passes no usable gradient: replace it in the backward pass by a smooth substitute (BPDA), and use Square, which "
        "needs no gradients"
    )


def misleading_gradients(e: Evidence) -> Finding | None:
    """Fires if a short step along the gradient gains less than SLOPE_KEPT of the first-order prediction, on most samples."""
    if e.slope_kept is None or e.slope_kept >= SLOPE_KEPT:
        return None
    return (
        f"a step of {SHORT * e.epsilon:.3g} along the gradient gains {e.slope_kept:.1%} of what the gradient predicts (median of {e.n} "
        "samples)",
        "the loss surface is rough, or its gradient is wrong: average gradients over noise in the input, replace the masking layer in the "
        "backward pass (BPDA), and use Square",
    )


def loss_still_rising(e: Evidence) -> Finding | None:
    """Fires if the last tenth of the steps still moves the survivors' margin at more than STILL_RISING of the mean pace.

    The margin is used although PGD ascends cross-entropy: for correct images, cross-entropy is about exp(margin), and grows fastest at
    the end even if the attack converges. For attacks that converge, the pace was at most 0.4 (digits, 5 to 50 steps, both norms).
    Saturated logits of unit length raise this flag, with good reason: on digits in L2, four times as many steps of the same length broke
    7 of 94 and 8 of 17 survivors.
    """
    last = max(1, round(e.steps / 10))
    if e.survivors < FEWEST_SURVIVORS or len(e.margins) <= last:
        return None
    total, late = e.margins[-1] - e.margins[0], e.margins[-1] - e.margins[-1 - last]
    if not total > 0 or not late * e.steps > STILL_RISING * total * last:
        return None
    return (
        f"the last {last} of {e.steps} steps give {late / total:.0%} of PGD's gain in margin on the {e.survivors} samples that "
        f"survive it ({e.margins[0]:.3g} to {e.margins[-1]:.3g})",
        f"more steps of the same length ({4 * e.steps} instead of {e.steps}, each of {default_step_size(e.epsilon, e.steps):.3g}) until "
        "the loss stops rising; more but shorter steps do not help",
    )


def success_lost(e: Evidence) -> Finding | None:
    """Fires if more than TOLERATED of the adversarial images are correct in another batch, or outputs differ by more than INDEPENDENT.

    For a randomised model, only differences beyond those of two equal passes count.
    """
    if not beyond_tolerance(e.lost, e.n) and e.batch_difference <= max(INDEPENDENT, 2 * e.output_difference):
        return None
    return (
        f"{e.lost} of the {e.broken} samples that PGD breaks are classified correctly by a fresh copy of the model, in other batches; "
        f"outputs differ by up to {e.batch_difference:.2g} of the largest",
        "freeze batch norms and buffers (eval mode), then attack again: the output depends on the batch, on hidden state or on chance",
    )


def randomised(e: Evidence) -> Finding | None:
    """Fires if two equal passes differ by more than REPEATABLE of the largest output, or in a prediction."""
    if e.output_difference <= REPEATABLE and not e.predictions_changed:
        return None
    return (
        f"two passes over the same {e.images} images differ by up to {e.output_difference:.2g} of the largest output, "
        f"{e.predictions_changed} predictions change",
        "attack the expectation: average gradients over many draws (EOT), and score the average of many passes",
    )


def softmax_output(e: Evidence) -> Finding | None:
    """Fires if outputs are probabilities (never negative, constant sum) or log-probabilities (log sum exp = 0)."""
    if e.output_low >= 0 and e.output_sum > 0 and e.output_sum_spread <= SAME * e.output_sum:
        return (
            f"outputs are probabilities: none below {e.output_low:.2g}, and every row sums to {e.output_sum:.4g}",
            "return the output of the layer before the softmax: cross-entropy of probabilities is flat at high confidence, so attacks fail",
        )
    if e.output_log_sum_exp <= SAME:
        return (
            f"outputs are log-probabilities: log sum exp is at most {e.output_log_sum_exp:.1g} from 0 in every row",
            "return the output of the layer before the log-softmax: attacks lose the values that are rounded to 0",
        )
    return None


# Flags

# Order of the flags. A flag has the name of its rule.
RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    curve_not_monotone,
    curve_above_chance,
    single_step_stronger,
    figure_too_high,
    black_box_stronger,
    dead_gradients,
    misleading_gradients,
    loss_still_rising,
    randomised,
    success_lost,
    softmax_output,
)


@dataclass(frozen=True)
class Flag:
    """A sign of gradient masking or of a wrong measurement: the observation, in numbers, and what to try."""

    name: str
    saw: str
    try_: str

    def as_record(self) -> dict[str, str]:
        """Plain dict for JSON and tables."""
        return {"name": self.name, "saw": self.saw, "try": self.try_}


def flags(evidence: Evidence) -> list[Flag]:
    """All flags that the evidence raises, in the order of RULES.

        >>> evidence = probe(model, images, labels, threat_model=ThreatModel("linf", 8 / 255), classes=10, steps=50, seed=0)
        >>> [flag.name for flag in flags(evidence)]
        ['curve_above_chance', 'black_box_stronger', 'dead_gradients']

    A robust model and one with masked gradients may have the same accuracy under attack, but differ in the measurements of `probe`.
    The robust accuracy of a model without flags may still be too high; a model with flags has not been attacked properly yet.
    """
    return [Flag(rule.__name__, *found) for rule in RULES if (found := rule(evidence))]


def at_chance(correct: int, classes: Sequence[int]) -> list[Flag]:
    """Flag a model that is no better than always naming the most frequent class: the clean accuracy's 95 % interval begins at or below it.

    Needs no probes. An attack cannot lower the accuracy of such a model much, which says nothing about its robustness.

    Args:
        correct: number of clean test images that the model classifies correctly.
        classes: number of test images of each class.
    """
    n, chance = sum(classes), max(classes) / sum(classes)
    low, high = wilson(correct, n)
    if low > chance:
        return []
    saw = (
        f"the clean accuracy, {correct / n:.1%} [{low:.1%}, {high:.1%}], is not above chance: always naming the most frequent class gives "
        f"{chance:.1%} of the {n} test images, so accuracies under attack say nothing about robustness"
    )
    remedy = "more epochs, another learning rate, or a smaller training epsilon; for an external model, check classes and normalisation"
    return [Flag(AT_CHANCE, saw, remedy)]
