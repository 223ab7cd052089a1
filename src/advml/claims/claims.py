"""The paper's six claims, each divided into measurable parts: a number, a bound, the side it should be on, and the paper's figure.

Order and wording follow the paper. To add a claim, add a row to CLAIMS; to add a number, a function of a Study.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from advml import recipes
from advml.claims.evidence import Measured, Study, change, difference
from advml.similarity import measures
from advml.similarity.compare import SCHEME_PAIRS
from advml.similarity.measures import SCALARS

# Rule by which an effect supports or contradicts a claim.
#
# A claim has parts, each a number and a bound, such as "redundancy of AT minus that of ST is above 0".
#
# - A part is `supported` if its whole 95 % interval is on the claimed side of the bound, `contradicted` if the whole
#   interval is on the other side, else `inconclusive`. Without an interval (one batch, one image) it is `inconclusive`.
# - A part whose models are missing is `not tested`.
# - A claim is `not tested` if any part is not; else `contradicted` if any part is; `supported` if all are; else `inconclusive`.
#
# With one seed the interval is over test images alone, so another training, or the same one on another processor, may give another
# verdict; therefore `worded` appends "for this seed".

Verdict = Literal["supported", "contradicted", "inconclusive", "not tested"]
Side = Literal["above", "below"]


def judge(interval: tuple[float, float] | None, side: Side, bound: float) -> Verdict:
    """Verdict on one part from the 95 % interval of its number; None: the part could not be tested."""
    if interval is None:
        return "not tested"
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    if side == "below":
        low, high, bound = -high, -low, -bound
    if low > bound:
        return "supported"
    return "contradicted" if high < bound else "inconclusive"


def overall(parts: Sequence[Verdict]) -> Verdict:
    """Verdict on a claim from the verdicts on its parts."""
    for verdict in ("not tested", "contradicted"):
        if verdict in parts:
            return verdict
    return "supported" if set(parts) == {"supported"} else "inconclusive"


def worded(verdict: Verdict, *, seeds: int) -> str:
    """Text of a verdict: `supported for this seed` with one seed, `supported` with more.

    Args:
        seeds: number of seeds behind the interval.
    """
    return f"{verdict} for this seed" if seeds == 1 and verdict != "not tested" else verdict


MARGIN = 0.02  # changes of CKA up to this size count as no change
AGREE = 0.9  # clean and adversarial representations agree if their CKA is above this
THREAT_MODEL, WORST_CASE = "accuracy/threat_model_2", "accuracy/worst_case"

CROSS = measures.Scalar(measures.mean_off_diagonal, **measures.ADVERSARIAL)

# A number of one seed, from one study or (for training epsilons) several, smallest epsilon first.
Effect = Callable[[list[Study]], Measured]


@dataclass(frozen=True)
class Part:
    """One number that the claim says is above or below a bound. `paper` is the authors' figure; None: they give none.

    Attributes:
        measures: "none": not a similarity; "cka": a bound on the scale of CKA; "any": a change, to be tested under other measures too.
    """

    name: str
    effect: Effect
    paper: float | None = None
    side: Side = "above"
    bound: float = 0.0
    several_epsilons: bool = False  # needs studies of two or more training epsilons
    measures: Literal["none", "cka", "any"] = "none"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, in one sentence, with the parts that test it."""

    key: str
    sentence: str
    parts: tuple[Part, ...]


@cache
def paper() -> dict[str, Any]:
    """The paper's figures, by quantity."""
    return json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


SCHEMES = tuple(name for name in recipes.SCHEMES if name in paper()["redundancy"])  # the paper's schemes


def _changed(quantity: str, scheme: str, before: str, after: str, label: str, **rule: Any) -> Part:
    """Part: the change of one quantity of CKA between two regimes; a rise, unless `rule` says otherwise."""
    figures = paper()[quantity][scheme]

    def effect(studies: list[Study]) -> Measured:
        return change(studies[0].block(scheme, after), studies[0].block(scheme, before), SCALARS[quantity])

    return Part(
        f"{scheme}: {label}, {after} minus {before}",
        effect,
        figures[after] - figures[before],
        **({"bound": MARGIN, "measures": "any"} | rule),
    )


def _lift(scheme: str, metric: str) -> Effect:
    return lambda studies: difference(studies[0].accuracy(metric, scheme, "Full-AT"), studies[0].accuracy(metric, scheme, "AT"))


def _lift_parts(label: str, metric: str) -> tuple[Part, ...]:
    """Parts on CL's gain in one accuracy, Full-AT minus AT: it is positive, and larger than the gains of SL and SCL."""

    def over(scheme: str) -> Effect:
        return lambda studies: difference(_lift("CL", metric)(studies), _lift(scheme, metric)(studies))

    others = (Part(f"gain in {label} (Full-AT minus AT), CL minus {scheme}", over(scheme)) for scheme in ("SL", "SCL"))
    return Part(f"CL: {label}, Full-AT minus AT", _lift("CL", metric)), *others


def _agreement(scheme: str, regime: str, **rule: Any) -> Part:
    def effect(studies: list[Study]) -> Measured:
        return studies[0].block(scheme, regime).scalar(SCALARS["clean_adversarial"])

    rule |= {"bound": AGREE, "measures": "cka"}
    return Part(f"{scheme}: clean-adversarial CKA of {regime}", effect, paper()["clean_adversarial"][scheme][regime], **rule)


def _convergence(first: str, second: str) -> Part:
    figures = paper()["cross"][f"{first}-{second}"]

    def effect(studies: list[Study]) -> Measured:
        return change(studies[0].cross("AT", first, second), studies[0].cross("ST", first, second), CROSS)

    return Part(
        f"{first} with {second}: CKA on adversarial images, AT minus ST",
        effect,
        figures["AT"] - figures["ST"],
        bound=MARGIN,
        measures="any",
    )


def _gain(quarter: str, scheme: str) -> Effect:
    """Gain of clean-adversarial CKA in a quarter of the layers, largest minus smallest training epsilon."""
    scalar = SCALARS[f"clean_adversarial_{quarter}"]
    return lambda studies: change(studies[-1].block(scheme, "AT"), studies[0].block(scheme, "AT"), scalar)


def _epsilon_parts(scheme: str) -> tuple[Part, Part]:
    figures = paper()["epsilon"][scheme]
    last, first = (figures[quarter][1] - figures[quarter][0] for quarter in ("last_quarter", "first_quarter"))
    rule = {"bound": MARGIN, "several_epsilons": True, "measures": "any"}
    return (
        Part(
            f"{scheme}: clean-adversarial CKA of the last quarter, largest minus smallest training epsilon",
            _gain("last_quarter", scheme),
            last,
            **rule,
        ),
        Part(
            f"{scheme}: that gain, last quarter minus first quarter",
            lambda studies: difference(_gain("last_quarter", scheme)(studies), _gain("first_quarter", scheme)(studies)),
            last - first,
            **rule,
        ),
    )


CLAIMS = (
    Claim(
        "redundancy",
        "Adversarial training makes layers more redundant.",
        tuple(_changed("redundancy", scheme, "ST", "AT", "redundancy") for scheme in SCHEMES),
    ),
    Claim(
        "full_fine_tuning_redundancy",
        "Full adversarial fine-tuning reduces this redundancy for CL, and not for SL or SCL.",
        (
            _changed("redundancy", "CL", "AT", "Full-AT", "redundancy", side="below", bound=-MARGIN),
            _changed("long_range", "CL", "AT", "Full-AT", "long-range CKA", side="below", bound=-MARGIN),
            _changed("redundancy", "SL", "AT", "Full-AT", "redundancy", bound=-MARGIN),
            _changed("redundancy", "SCL", "AT", "Full-AT", "redundancy", bound=-MARGIN),
        ),
    ),
    Claim(
        "full_fine_tuning_robustness",
        "Full adversarial fine-tuning raises CL's robust accuracy, and by more than that of SL and SCL.",
        # The paper's figure, and worst-case accuracy, because robustness against a single attack is not enough.
        (*_lift_parts("accuracy under threat model II", THREAT_MODEL), *_lift_parts("worst-case accuracy", WORST_CASE)),
    ),
    Claim(
        "clean_adversarial",
        "Clean and adversarial representations differ in ST networks and agree in AT networks.",
        (
            *(_changed("clean_adversarial", scheme, "ST", "AT", "clean-adversarial CKA") for scheme in SCHEMES),
            *(_agreement(scheme, "ST", side="below") for scheme in SCHEMES),
            *(_agreement(scheme, "AT") for scheme in SCHEMES),
        ),
    ),
    Claim(
        "convergence",
        "Under adversarial training the schemes learn more similar representations.",
        tuple(_convergence(*pair) for pair in SCHEME_PAIRS),
    ),
    Claim(
        "epsilon",
        "A larger training epsilon raises clean-adversarial similarity, most near the end of the network.",
        tuple(part for scheme in SCHEMES for part in _epsilon_parts(scheme)),
    ),
)
