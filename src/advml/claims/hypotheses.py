"""The paper's six claims, each as parts that can be measured: a number, the side of a bound it should be on, the paper's figure.

The order and the wording follow the paper's; the rule that turns numbers into verdicts is in `verdicts`. To add a claim,
add a row to CLAIMS; to add a number, a function of a Study.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from advml.claims.evidence import Study, difference
from advml.claims.verdicts import Side
from advml.similarity.summary import Estimate

SCHEMES = ("SL", "CL", "SCL")
PAIRS = (("SCL", "CL"), ("SL", "CL"), ("SL", "SCL"))
MARGIN = 0.02  # of CKA: a smaller change counts as none
AGREE = 0.9  # of CKA: clean and adversarial representations above it agree
ROBUST = "accuracy/threat_model_2"

# A number of one study (or, for training epsilons, of several: weakest adversary first) and one seed.
Effect = Callable[[list[Study]], Estimate]


@dataclass(frozen=True)
class Part:
    """One number that the claim says is above or below a bound. `paper` is the authors' own, None where they give none."""

    name: str
    effect: Effect
    paper: float | None = None
    side: Side = "above"
    bound: float = 0.0
    several_epsilons: bool = False  # needs studies of two or more training epsilons


@dataclass(frozen=True)
class Claim:
    """What the paper says, in a sentence, and the parts it is tested by."""

    key: str
    sentence: str
    parts: tuple[Part, ...]


@cache
def paper() -> dict[str, Any]:
    """The authors' figures, by quantity."""
    return json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def _change(quantity: str, scheme: str, before: str, after: str) -> Effect:
    return lambda studies: difference(studies[0].scalar(quantity, scheme, after), studies[0].scalar(quantity, scheme, before))


def _published(quantity: str, scheme: str, before: str, after: str) -> float:
    figures = paper()[quantity][scheme]
    return figures[after] - figures[before]


def _changed(quantity: str, scheme: str, before: str, after: str, label: str, **rule: Any) -> Part:
    """A change of one quantity between two regimes."""
    name = f"{scheme}: {label}, {after} minus {before}"
    return Part(name, _change(quantity, scheme, before, after), _published(quantity, scheme, before, after), **rule)


def _lift(scheme: str) -> Effect:
    return lambda studies: difference(studies[0].accuracy(ROBUST, scheme, "Full-AT"), studies[0].accuracy(ROBUST, scheme, "AT"))


def _lift_over(scheme: str) -> Effect:
    return lambda studies: difference(_lift("CL")(studies), _lift(scheme)(studies))


def _agreement(scheme: str) -> Part:
    effect: Effect = lambda studies: studies[0].scalar("clean_adversarial", scheme, "AT")  # noqa: E731
    return Part(f"{scheme}: clean-adversarial CKA of AT", effect, paper()["clean_adversarial"][scheme]["AT"], bound=AGREE)


def _convergence(first: str, second: str) -> Part:
    figures = paper()["cross"][f"{first}-{second}"]
    return Part(
        f"{first} with {second}: CKA on adversarial images, AT minus ST",
        lambda studies: difference(studies[0].cross("AT", first, second), studies[0].cross("ST", first, second)),
        figures["AT"] - figures["ST"],
    )


def _gain(quarter: str, scheme: str) -> Effect:
    """Of clean-adversarial CKA in a quarter of the layers, largest minus smallest training epsilon."""
    name = f"clean_adversarial_{quarter}"
    return lambda studies: difference(studies[-1].scalar(name, scheme, "AT"), studies[0].scalar(name, scheme, "AT"))


def _epsilon_parts(scheme: str) -> tuple[Part, Part]:
    figures = paper()["epsilon"][scheme]
    last, first = (figures[quarter][1] - figures[quarter][0] for quarter in ("last_quarter", "first_quarter"))
    return (
        Part(
            f"{scheme}: clean-adversarial CKA of the last quarter, largest minus smallest training epsilon",
            _gain("last_quarter", scheme),
            last,
            several_epsilons=True,
        ),
        Part(
            f"{scheme}: the same gain, last quarter minus first quarter",
            lambda studies: difference(_gain("last_quarter", scheme)(studies), _gain("first_quarter", scheme)(studies)),
            last - first,
            several_epsilons=True,
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
            _changed("redundancy", "CL", "AT", "Full-AT", "redundancy", side="below"),
            _changed("long_range", "CL", "AT", "Full-AT", "long-range CKA", side="below"),
            _changed("redundancy", "SL", "AT", "Full-AT", "redundancy", bound=-MARGIN),
            _changed("redundancy", "SCL", "AT", "Full-AT", "redundancy", bound=-MARGIN),
        ),
    ),
    Claim(
        "full_fine_tuning_robustness",
        "Full adversarial fine-tuning raises CL's robust accuracy, and by more than that of SL and SCL.",
        (
            Part("CL: robust accuracy, Full-AT minus AT", _lift("CL")),
            Part("the same lift, CL minus SL", _lift_over("SL")),
            Part("the same lift, CL minus SCL", _lift_over("SCL")),
        ),
    ),
    Claim(
        "clean_adversarial",
        "Clean and adversarial representations differ in ST networks and agree in AT networks.",
        (
            *(_changed("clean_adversarial", scheme, "ST", "AT", "clean-adversarial CKA") for scheme in SCHEMES),
            *(_agreement(scheme) for scheme in SCHEMES),
        ),
    ),
    Claim(
        "convergence",
        "Under adversarial training the schemes learn more similar representations.",
        tuple(_convergence(*pair) for pair in PAIRS),
    ),
    Claim(
        "epsilon",
        "A larger training epsilon raises clean-adversarial similarity, most near the end of the network.",
        tuple(part for scheme in SCHEMES for part in _epsilon_parts(scheme)),
    ),
)
