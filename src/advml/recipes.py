"""The two tables of the paper: what is learned (schemes), and when the attack is present (regimes).

A scheme and a regime are rows of data; no code asks for one by name. Configuration, command line, trainer, evaluation, searches and claims
all read these rows, so a new row works everywhere (docs/extending.md). Nothing heavy is imported here: `advml --help` reads the names.

| scheme | views | head       | positives of an anchor | loss of embeddings | known as |
|--------|-------|------------|------------------------|--------------------|----------|
| SL     | 1     | classifier | - (cross-entropy)      | -                  | -        |
| CL     | 2     | projection | the other views        | contrastive        | SimCLR   |
| SCL    | 2     | projection | all views of its class | contrastive        | SupCon   |
| EMP    | 16    | projection | the other views        | emp-ssl            | EMP-SSL  |

A hybrid learns two of these at once, one from labelled, one from unlabelled images:

| scheme | labelled images | unlabelled images | in the paper's code |
|--------|-----------------|-------------------|---------------------|
| CLxSL  | SL              | CL                | CL-SL               |
| CLxSCL | SCL             | CL                | CL-SCL              |
| SCLxSL | SL              | SCL: reads labels | SCL-SL              |

| regime     | pretraining | fine-tuning | trained in fine-tuning | known as |
|------------|-------------|-------------|------------------------|----------|
| ST         | standard    | standard    | head                   | -        |
| AT         | adversarial | standard    | head                   | SLF      |
| Partial-AT | adversarial | adversarial | head                   | ALF      |
| Full-AT    | adversarial | adversarial | encoder and head       | AFF      |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    groups: Callable[[Tensor], Tensor] | None = None  # labels (N,) -> group ids (N,); None: no loss of embeddings
    known_as: str = ""
    views: int = 2  # of an image in a batch, unless its phase says otherwise
    loss: Literal["contrastive", "emp-ssl"] = "contrastive"  # of the embeddings, a key of training.losses.EMBEDDING_LOSSES
    attacked: Literal["image", "views"] = "image"  # what adversarial pretraining perturbs, unless its phase says otherwise
    terms: tuple[Scheme, ...] = ()  # of a hybrid: what it learns from labelled images, what from unlabelled ones

    @property
    def has_temperature(self) -> bool:
        """Whether its loss divides similarities by the study's temperature."""
        return self.groups is not None and self.loss == "contrastive"

    @property
    def parts(self) -> tuple[Scheme, ...]:
        """The schemes that it learns at once: its terms, or itself."""
        return self.terms or (self,)

    @property
    def heads(self) -> set[str]:
        """The heads that it learns."""
        return {part.head for part in self.parts}

    @property
    def reads_labels(self) -> bool:
        """Whether its loss depends on labels; of a hybrid, on those of labelled images."""
        return self.parts[0].groups is not instances

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


def hybrid(name: str, *, labelled: Scheme, unlabelled: Scheme) -> Scheme:
    """A scheme of two terms. It predicts by the head of its labelled term, and threat model I attacks that term, if it is contrastive."""
    attackable = labelled if labelled.groups else unlabelled
    known_as, title = f"{unlabelled.name}-{labelled.name}", f"{labelled.title} and {unlabelled.title}"
    return replace(attackable, name=name, title=title, head=labelled.head, known_as=known_as, terms=(labelled, unlabelled))


SCHEMES: dict[str, Scheme] = {
    "SL": Scheme("SL", "supervised", head="classifier", view="supervised", views=1),
    "CL": Scheme("CL", "contrastive", head="projection", view="contrastive", groups=instances, known_as="SimCLR"),
    "SCL": Scheme("SCL", "supervised contrastive", head="projection", view="contrastive", groups=classes, known_as="SupCon"),
    "EMP": Scheme(
        "EMP",
        "many crops",
        head="projection",
        view="contrastive",
        groups=instances,
        known_as="EMP-SSL",
        views=16,
        loss="emp-ssl",
        attacked="views",
    ),
}
SCHEMES |= {
    "CLxSL": hybrid("CLxSL", labelled=SCHEMES["SL"], unlabelled=SCHEMES["CL"]),
    "CLxSCL": hybrid("CLxSCL", labelled=SCHEMES["SCL"], unlabelled=SCHEMES["CL"]),
    "SCLxSL": hybrid("SCLxSL", labelled=SCHEMES["SL"], unlabelled=SCHEMES["SCL"]),
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
