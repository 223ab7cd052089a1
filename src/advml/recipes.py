"""The two tables of the paper: what is learned (schemes), and when the attack is present (regimes).

A scheme and a regime are rows of data; no code asks for one by name. Configuration, command line, trainer, evaluation, searches and claims
all read these rows, so a new row works everywhere (docs/extending.md). Nothing heavy is imported here: `advml --help` reads the names.

| scheme | views | head       | positives of an anchor | known as |
|--------|-------|------------|------------------------|----------|
| SL     | 1     | classifier | - (cross-entropy)      | -        |
| CL     | 2     | projection | the other view         | SimCLR   |
| SCL    | 2     | projection | all views of its class | SupCon   |

| regime     | pretraining | fine-tuning | trained in fine-tuning | known as |
|------------|-------------|-------------|------------------------|----------|
| ST         | standard    | standard    | head                   | -        |
| AT         | adversarial | standard    | head                   | SLF      |
| Partial-AT | adversarial | adversarial | head                   | ALF      |
| Full-AT    | adversarial | adversarial | encoder and head       | AFF      |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

PhaseName = Literal["st", "at"]  # of a pretraining: standard, adversarial


@dataclass(frozen=True)
class Scheme:
    """One row of the first table."""

    name: str  # without `-`, which separates the parts of a stage's name
    title: str
    head: Literal["classifier", "projection"]
    view: Literal["supervised", "contrastive"]  # which section of params.yaml: views
    groups: Callable[[Tensor], Tensor] | None = None  # labels (N,) -> group ids (N,); None: no contrastive objective
    known_as: str = ""

    @property
    def described(self) -> str:
        """`contrastive (SimCLR)`."""
        return f"{self.title} ({self.known_as})" if self.known_as else self.title


def instances(labels: Tensor) -> Tensor:
    """Every image is a group of its own: SimCLR is SupCon whose labels are the instance ids."""
    return labels.new_ones(len(labels)).cumsum(0)


def classes(labels: Tensor) -> Tensor:
    """All images of a class form a group."""
    return labels


SCHEMES: dict[str, Scheme] = {
    "SL": Scheme("SL", "supervised", head="classifier", view="supervised"),
    "CL": Scheme("CL", "contrastive", head="projection", view="contrastive", groups=instances, known_as="SimCLR"),
    "SCL": Scheme("SCL", "supervised contrastive", head="projection", view="contrastive", groups=classes, known_as="SupCon"),
}


@dataclass(frozen=True)
class Regime:
    """One row of the second table."""

    name: str
    pretraining: PhaseName
    attacked: bool  # in fine-tuning
    encoder_learns: bool  # in fine-tuning; the head always does

    @property
    def described(self) -> str:
        """`adversarial pretraining, standard fine-tuning of the head`."""
        kinds = ["adversarial" if attacked else "standard" for attacked in (self.pretraining == "at", self.attacked)]
        return f"{kinds[0]} pretraining, {kinds[1]} fine-tuning of {'encoder and head' if self.encoder_learns else 'the head'}"

    def finetunes(self, scheme: Scheme) -> bool:
        """Whether there is anything left to learn: a scheme that pretrains its classifier is done under ST and AT."""
        return scheme.head != "classifier" or self.attacked or self.encoder_learns

    def keeps_head(self, scheme: Scheme) -> bool:
        """Whether fine-tuning continues with the pretrained classifier (SL, Full-AT) or fits a new one."""
        return scheme.head == "classifier" and (self.encoder_learns or not self.attacked)


REGIMES: dict[str, Regime] = {
    "ST": Regime("ST", pretraining="st", attacked=False, encoder_learns=False),
    "AT": Regime("AT", pretraining="at", attacked=False, encoder_learns=False),
    "Partial-AT": Regime("Partial-AT", pretraining="at", attacked=True, encoder_learns=False),
    "Full-AT": Regime("Full-AT", pretraining="at", attacked=True, encoder_learns=True),
}

SchemeName = Literal[tuple(SCHEMES)]
RegimeName = Literal[tuple(REGIMES)]
