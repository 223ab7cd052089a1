"""The two tables of the paper: schemes (the training objective) and regimes (the phases under attack).

Schemes and regimes are rows of data; no code branches on their names. Configuration, command line, trainer, evaluation, searches and
claims read these rows, so a new row works everywhere (docs/extending.md). No heavy imports, because `advml --help` reads the names.

| scheme | views | head       | positives of an anchor | loss of embeddings | known as |
|--------|-------|------------|------------------------|--------------------|----------|
| SL     | 1     | classifier | - (cross-entropy)      | -                  | -        |
| CL     | 2     | projection | the other views        | contrastive        | SimCLR   |
| SCL    | 2     | projection | all views of its class | contrastive        | SupCon   |
| EMP    | 16    | projection | the other views        | emp-ssl            | EMP-SSL  |

A hybrid trains two of these at once, one on labelled, one on unlabelled images:

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

PhaseName = Literal["st", "at"]  # kind of pretraining: standard, adversarial


WITHOUT_TEMPERATURE = ("emp-ssl",)  # losses of embeddings that do not use the study's temperature


@dataclass(frozen=True)
class Scheme:
    """A scheme: one row of the first table."""

    name: str  # without `-`, which separates the parts of a stage's name
    title: str
    head: Literal["classifier", "projection"]
    view: Literal["supervised", "contrastive"]  # key in section `views` of params.yaml
    groups: Callable[[Tensor], Tensor] | None = None  # labels (N,) -> group ids (N,); None: no loss of embeddings
    known_as: str = ""
    views: int = 2  # views per image, unless set in the phase's section
    loss: Literal["contrastive", "emp-ssl"] = "contrastive"  # loss of embeddings, a key of training.losses.EMBEDDING_LOSSES
    attacked: Literal["image", "views"] = "image"  # input that adversarial pretraining perturbs, unless set in the phase's section
    terms: tuple[Scheme, ...] = ()  # of a hybrid: its schemes for labelled and for unlabelled images

    @property
    def has_temperature(self) -> bool:
        """Whether the loss divides similarities by the study's temperature."""
        return self.groups is not None and self.loss not in WITHOUT_TEMPERATURE

    @property
    def parts(self) -> tuple[Scheme, ...]:
        """Schemes that are trained at once: the terms of a hybrid, or the scheme itself."""
        return self.terms or (self,)

    @property
    def heads(self) -> set[str]:
        """Heads that are trained."""
        return {part.head for part in self.parts}

    @property
    def reads_labels(self) -> bool:
        """Whether the loss depends on labels; for a hybrid, on those of labelled images."""
        return self.parts[0].groups is not instances

    @property
    def described(self) -> str:
        """`contrastive (SimCLR)`."""
        return f"{self.title} ({self.known_as})" if self.known_as else self.title


def instances(labels: Tensor) -> Tensor:
    """Groups of SimCLR: every image is a group of its own, which makes SupCon equal to SimCLR."""
    return labels.new_ones(len(labels)).cumsum(0)


def classes(labels: Tensor) -> Tensor:
    """Groups of SupCon: all images of a class form a group."""
    return labels


def hybrid(name: str, *, labelled: Scheme, unlabelled: Scheme) -> Scheme:
    """Scheme of two terms. It predicts with the head of its labelled term, which threat model I attacks if it is contrastive."""
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
    """A regime: one row of the second table."""

    name: str
    pretraining: PhaseName
    attacked: bool  # whether fine-tuning is adversarial
    encoder_learns: bool  # whether fine-tuning trains the encoder; it always trains the head

    @property
    def described(self) -> str:
        """Description in words: `adversarial pretraining, standard fine-tuning of the head`."""
        kinds = ["adversarial" if attacked else "standard" for attacked in (self.pretraining == "at", self.attacked)]
        return f"{kinds[0]} pretraining, {kinds[1]} fine-tuning of {'encoder and head' if self.encoder_learns else 'the head'}"

    def finetunes(self, scheme: Scheme) -> bool:
        """Whether there is a fine-tuning; schemes that pretrain their classifier have none under ST and AT."""
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
