"""Rules of the gradient-masking checks: each judges the evidence and says what it saw and what to try, or None; and the flags.

No rule fires on a difference that chance explains: counts are tested against it, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from advml.attacks.pgd import default_step_size
from advml.evaluation.intervals import binomial_tail
from advml.evaluation.masking.evidence import SHORT, Evidence

Finding = tuple[str, str]  # what was seen, in numbers; what to try

SIGNIFICANCE = 0.01  # a rule fires when chance alone would do it less often
TOLERATED = 0.01  # share of samples on which a weaker attack may be luckier, or rounding may change a verdict
CHANCE_FLOOR = 0.05  # with many classes: a share of survivors at the widest epsilon below which nothing is said
DEAD_SHARE = 0.05  # of samples with a gradient of exactly zero; more than that and attacks miss what they could break
STILL_RISING = 0.6  # pace of the margin in the last tenth of the steps, relative to its mean pace over all steps
FEWEST_SURVIVORS = 5  # for a mean margin
SLOPE_KEPT = 0.25  # of the gain that gradients promise over a short step; less, and they lead astray (honest models: above 0.9)
INDEPENDENT = 0.02  # relative difference of outputs in another batch that bf16 explains
REPEATABLE = 1e-4  # relative difference of two equal passes that float32 and parallel sums explain
SAME = 1e-3  # relative spread of row sums, or size of log sum exp, that rounding explains


def _beyond_chance(more: int, fewer: int) -> bool:
    """One-sided sign test: of the samples that disagree, `more` fell on one side."""
    return binomial_tail(more, more + fewer, share=0.5) < SIGNIFICANCE


def beyond_tolerance(count: int, n: int) -> bool:
    """Whether `count` of `n` is more than TOLERATED, and more than chance makes of that."""
    return binomial_tail(count, n, share=TOLERATED) < SIGNIFICANCE


def curve_not_monotone(e: Evidence) -> Finding | None:
    """A larger ball holds the smaller one, so accuracy cannot rise. Sign test, corrected for the number of pairs (Bonferroni)."""
    rise = e.rise
    if binomial_tail(rise.regained, rise.regained + rise.lost, share=0.5) * rise.pairs >= SIGNIFICANCE:
        return None
    return (
        f"accuracy rises with epsilon: {rise.regained} of {e.n} samples break at {rise.smaller:.4g} but not at {rise.larger:.4g}, "
        f"{rise.lost} the other way round",
        "more steps and restarts, starting from the adversarial images of the smaller epsilon, and the worst of all as the figure",
    )


def curve_above_chance(e: Evidence) -> Finding | None:
    """Where every image can become every other, no model is better than one that always says the most frequent class.

    That is right on 1 / K of the images or more; nothing is said below CHANCE_FLOOR.
    """
    last, chance = e.curve[-1], max(1 / e.classes, e.largest_class)
    if binomial_tail(last.right, e.images, share=max(chance, CHANCE_FLOOR)) >= SIGNIFICANCE:
        return None
    return (
        f"accuracy is still {last.accuracy:.3f} (at least {last.low:.3f}) at epsilon {last.epsilon:.4g}, where every image can become "
        f"every other; chance is {chance:.3g}",
        "the attack, not the model, fails there: look at the gradients, attack the margin or DLR objective, take Square or more steps",
    )


def single_step_stronger(e: Evidence) -> Finding | None:
    """Many steps search more than one, so one step should not win. Sign test."""
    if not _beyond_chance(e.single_step_only, e.multi_step_only):
        return None
    return (
        f"one step (FGSM) breaks {e.single_step_only} of {e.n} samples that {e.steps} steps of PGD don't, "
        f"{e.multi_step_only} the other way round",
        "smaller steps and more restarts, and PGD from FGSM's images: near the image the loss is not what it seems",
    )


def figure_too_high(e: Evidence) -> Finding | None:
    """The attacks behind a figure should break what these cheap probes break; what these break is counted in the worst case."""
    if not beyond_tolerance(e.figure_broken, e.n):
        return None
    return (
        f"{e.figure_broken} of {e.n} samples survive all attacks of the worst case, but not {e.steps} steps of PGD, one step, or noise; "
        "they are counted as broken; the other test images were not probed",
        "a stronger attack in evaluate (step_size: null, more steps, a random start) and the whole cascade in worst_case",
    )


def black_box_stronger(e: Evidence) -> Finding | None:
    """Attacks that see no gradient of the model know less, so they should not win on more than TOLERATED of the samples."""
    stronger = {name: count for name, count in e.black_box.items() if beyond_tolerance(count, e.n)}
    if not stronger:
        return None
    listed = ", ".join(f"{name} {count}" for name, count in stronger.items())
    return (
        f"attacks without gradients break samples that survive all white-box attacks: {listed} of {e.n} ({e.white_box_right} survive)",
        "the gradients mislead, so more queries for Square, and white-box attacks through a smooth substitute of the layer at fault (BPDA)",
    )


def dead_gradients(e: Evidence) -> Finding | None:
    """A gradient of exactly zero, on more than DEAD_SHARE of the samples, or one that is not finite, on any, moves no attack."""
    zero = max(e.zero_clean, e.zero_random)
    if zero <= DEAD_SHARE * e.n and not e.non_finite:
        return None
    saw = (
        f"of {e.n} samples the gradient of cross-entropy is exactly zero for {e.zero_clean} at the image and {e.zero_random} at a random "
        f"point nearby; not finite for {e.non_finite}"
    )
    if e.gradient_error:
        saw += f"; the reason given: {e.gradient_error}"
    saturated = zero > DEAD_SHARE * e.n and e.zero_margin <= DEAD_SHARE * e.n
    return saw, (
        f"the loss is saturated, the margin is not (zero for {e.zero_margin}): attack the margin or DLR objective, or divide the logits "
        "by their scale"
        if saturated
        else "a layer passes no usable gradient: replace it in the backward pass by a smooth substitute (BPDA), and take Square, which "
        "needs none"
    )


def misleading_gradients(e: Evidence) -> Finding | None:
    """A short step along the gradient gains less than SLOPE_KEPT of what the gradient promises, on most samples."""
    if e.slope_kept is None or e.slope_kept >= SLOPE_KEPT:
        return None
    return (
        f"a step of {SHORT * e.epsilon:.3g} along the gradient gains {e.slope_kept:.1%} of what the gradient promises (median of {e.n} "
        "samples)",
        "the loss is far rougher than it looks, or its gradient is wrong: average gradients over noise in the input, replace the layer at "
        "fault in the backward pass (BPDA), and take Square",
    )


def loss_still_rising(e: Evidence) -> Finding | None:
    """The last tenth of the steps moves the margin of the survivors at more than STILL_RISING of the mean pace.

    The margin, though PGD ascends cross-entropy: where the model is right, that is about exp(margin), and grows fastest at the end
    even when the attack comes to rest. Under attacks that converge, the pace was at most 0.4 (digits, 5 to 50 steps, both norms).
    Logits of unit length raise this flag where they are saturated, and rightly: on digits in L2, three times as many steps more, of the
    same length, broke 7 of 94 and 8 of 17 survivors.
    """
    last = max(1, round(e.steps / 10))
    if e.survivors < FEWEST_SURVIVORS or len(e.margins) <= last:
        return None
    total, late = e.margins[-1] - e.margins[0], e.margins[-1] - e.margins[-1 - last]
    if not total > 0 or not late * e.steps > STILL_RISING * total * last:
        return None
    return (
        f"the last {last} of {e.steps} steps give {late / total:.0%} of what PGD gains in margin on the {e.survivors} samples that "
        f"survive it ({e.margins[0]:.3g} to {e.margins[-1]:.3g})",
        f"more steps of the same length ({4 * e.steps} instead of {e.steps}, each of {default_step_size(e.epsilon, e.steps):.3g}) until "
        "the loss stands still; more but shorter ones come no further",
    )


def success_lost(e: Evidence) -> Finding | None:
    """An adversarial image is one in any batch. More than TOLERATED of them are not, or outputs move by more than INDEPENDENT.

    Outputs of a randomised model move anyway; they count only beyond that.
    """
    if not beyond_tolerance(e.lost, e.n) and e.batch_difference <= max(INDEPENDENT, 2 * e.output_difference):
        return None
    return (
        f"{e.lost} of the {e.broken} samples that PGD breaks are right again in a fresh copy of the model, in other batches; outputs "
        f"differ by up to {e.batch_difference:.2g} of the largest",
        "freeze batch norms and buffers (eval mode), then attack again: the verdict depends on the batch, on a state or on chance",
    )


def randomised(e: Evidence) -> Finding | None:
    """Two equal passes differ by more than REPEATABLE of the largest output, or in a prediction."""
    if e.output_difference <= REPEATABLE and not e.predictions_changed:
        return None
    return (
        f"two passes over the same {e.images} images differ by up to {e.output_difference:.2g} of the largest output, "
        f"{e.predictions_changed} predictions change",
        "attack the expectation: average gradients over many draws (EOT), and score the average of many passes",
    )


def softmax_output(e: Evidence) -> Finding | None:
    """Outputs that are never negative and always have the same sum are probabilities; log sum exp = 0 marks their logarithms."""
    if e.output_low >= 0 and e.output_sum > 0 and e.output_sum_spread <= SAME * e.output_sum:
        return (
            f"outputs are probabilities: none below {e.output_low:.2g}, and every row sums to {e.output_sum:.4g}",
            "hand in the layer before the softmax: cross-entropy of probabilities is flat where the model is sure, so attacks stall",
        )
    if e.output_log_sum_exp <= SAME:
        return (
            f"outputs are log-probabilities: log sum exp is at most {e.output_log_sum_exp:.1g} from 0 in every row",
            "hand in the layer before the log-softmax, as attacks expect; what rounding to 0 has cut off is lost to them",
        )
    return None


# Flags

# In this order. A flag has the name of its rule.
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
    """One sign of gradient masking or of a wrong measurement: what was observed, in numbers, and what to try."""

    name: str
    saw: str
    try_: str

    def as_record(self) -> dict[str, str]:
        """For JSON and tables."""
        return {"name": self.name, "saw": self.saw, "try": self.try_}


def flags(evidence: Evidence) -> list[Flag]:
    """All flags that the evidence raises, in the order of RULES.

        >>> evidence = probe(model, images, labels, threat_model=ThreatModel("linf", 8 / 255), classes=10, steps=50, seed=0)
        >>> [flag.name for flag in flags(evidence)]
        ['curve_above_chance', 'black_box_stronger', 'dead_gradients']

    A robust model and one whose gradients lead attacks astray have the same accuracy under attack; they differ in what `probe` measures.
    A model without flags may still be weaker than its accuracy; one with flags has not been attacked properly yet.
    """
    return [Flag(rule.__name__, *found) for rule in RULES if (found := rule(evidence))]
