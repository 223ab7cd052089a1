"""Training sections of params.yaml: the attack of adversarial training, the phases, and keys without effect in a phase."""

from __future__ import annotations

import operator
from typing import Annotated, Literal

from pydantic import Field

from advml.config.values import Epsilon, Number, PositiveShare, Section, Share, Steps, StepSize, Whole, means
from advml.core.errors import UserError
from advml.recipes import REGIMES, SCHEMES

Epochs = Annotated[Whole, Field(ge=1, le=100_000)]
AttackKind = Literal["pgd", "free", "fast"]


class TrainAttack(Section):
    """Attack of adversarial training. Default step size: 2.5 * epsilon / steps for pgd, epsilon for free, 1.25 * epsilon for fast."""

    kind: AttackKind = means(
        "pgd; free: `steps` replays of a batch update weights and perturbation at once; fast: one step from a random start", "pgd"
    )
    steps: Steps = means("of PGD; free: replays of a batch; fast: of the PGD that validates")
    step_size: StepSize | None = means("null: 2.5 * epsilon / steps", None)
    random_start: bool = means("false: start at the image; free starts at 0 once, and keeps its perturbation", True)
    batch_norm: Literal["eval", "train"] = means("mode of the model during the attack: eval, train", "eval")


class Phase(Section):
    """One training phase: duration, optimiser, loss, and selection of the weights."""

    epochs: Annotated[Whole, Field(ge=0, le=100_000)] = means(
        "passes over the training images; pretrain, 0: use model.init unchanged; free training divides them by its replays"
    )
    batch_size: Annotated[Whole, Field(ge=2, le=2**20)] = means("images in a batch")
    optimizer: Literal["adamw", "adam", "sgd"] = means("adamw, adam, sgd")
    # Bounded so that products inside optimisers stay below the largest float32.
    learning_rate: Annotated[Number, Field(ge=1e-30, le=1e30)] = means("maximum of the schedule")
    weight_decay: Annotated[Number, Field(ge=0, le=1000)] = means("on all trained weights")
    schedule: Literal["constant", "cosine", "onecycle"] = means("of the learning rate: constant, cosine, onecycle")
    warmup: Share = means("share of all steps in which the learning rate rises linearly from 0; onecycle has its own", 0.0)
    layer_decay: PositiveShare = means("the learning rate of block k from the top is multiplied by layer_decay^k; 1: all equal", 1.0)
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = means("of cross-entropy; CL and SCL have none", 0.0)
    loss: Literal["two-term", "trades"] = means(
        "adversarial term: two-term (cross-entropy), trades (divergence from x); CL and SCL have their own", "two-term"
    )
    clean_weight: Annotated[Number, Field(ge=0, le=1e6)] = means("of the clean term of the loss; 0: it is not computed", 1.0)
    adversarial_weight: Annotated[Number, Field(ge=0, le=1e6)] = means("of the adversarial term of the loss", 1.0)
    weight_annealing: Epochs | None = means("DynACL: epochs between increases of the adversarial weight; null: constant weights", None)
    attacked: Literal["image", "views"] | None = means(
        "what is perturbed: image, views (CL: ACL's dual stream); null: views of EMP, else the image", None
    )
    epsilon: Epsilon | None = means("radius of the attack in this phase; null: threat_model.epsilon", None)
    epsilon_warmup: Share = means("share of all steps in which epsilon, and the step size with it, rises from 0", 0.0)
    attack_kind: AttackKind | None = means("null: attack.kind", None)
    attack_steps: Steps | None = means("null: attack.steps", None)
    views: Annotated[Whole, Field(ge=2, le=1000)] | None = means("number of views per image; null: CL and SCL 2, EMP 16", None)
    averaged_crops: Literal[1, 5] = means("input of the classifier: 1: the image; 5: mean features of its centre and corners", 1)
    view_annealing: Epochs | None = means("DynACL: epochs between steps that weaken the views; null: full strength throughout", None)
    frozen_statistics: bool = means(
        "true: batch norms keep the statistics of pretraining, only their weights are trained; Full-AT only", False
    )
    gradient_clip: Annotated[Number, Field(ge=1e-9, le=1e9)] | None = means("largest norm of the gradient; null: any", None)
    average: Literal["none", "ema", "swa"] = means("average of the weights that is validated and kept: none, ema, swa", "none")
    average_decay: Annotated[Number, Field(gt=0, lt=1)] = means("ema: weight of the old average at every step", 0.99)
    average_start: Annotated[Number, Field(ge=0, lt=1)] = means("swa: share of all epochs that are left out of the average", 0.75)
    keep: Literal["best", "last"] = means("epoch whose weights are kept: best on validation, last", "best")


# Key of a phase -> key of the study whose value replaces a null
INHERITED = {"epsilon": "threat_model.epsilon", "attack_kind": "attack.kind", "attack_steps": "attack.steps"}
OF_THE_ATTACK = (
    *("loss", "clean_weight", "adversarial_weight", "weight_annealing", "attacked", "epsilon", "epsilon_warmup"),
    *("attack_kind", "attack_steps"),
)


def _without_effect() -> dict[str, dict[str, str]]:
    """Phase -> keys that have no effect in it -> reason; these keys must keep their defaults."""
    from_scratch = {"frozen_statistics": "pretraining starts without statistics to keep"}
    from_scratch |= {"averaged_crops": "crops are averaged in fine-tuning only"}
    no_classifier = dict.fromkeys(("label_smoothing", "loss"), "the contrastive objective has no cross-entropy")
    clean = dict.fromkeys(OF_THE_ATTACK, "this regime fine-tunes on clean images only")
    head_only = dict.fromkeys(("layer_decay", "frozen_statistics"), "this regime trains the head only, and the encoder is fixed")
    one_view = {"views": "cross-entropy uses one view of an image"}
    unaugmented = dict.fromkeys(("attacked", "views", "view_annealing"), "fine-tuning uses the images without augmentation")
    pretrain = {
        f"pretrain.{name}": from_scratch | ({} if "classifier" in scheme.heads else no_classifier) | ({} if scheme.groups else one_view)
        for name, scheme in SCHEMES.items()
    }
    return pretrain | {
        f"regimes.{name}": unaugmented | ({} if regime.attacked else clean) | ({} if regime.encoder_learns else head_only)
        for name, regime in REGIMES.items()
    }


WITHOUT_EFFECT = _without_effect()
OF_TWO_TERMS = dict.fromkeys(
    ("loss", "clean_weight", "adversarial_weight", "weight_annealing"), "free training has one term, the attacked one"
)


class Phases(dict[str, Phase]):
    """Phases by scheme or regime; a phase missing from params.yaml is an error only when it is used."""

    def __init__(self, kind: str, phases: dict[str, Phase]) -> None:
        super().__init__(phases)
        self.kind = kind

    def __missing__(self, name: str) -> Phase:
        raise UserError(f"params.yaml: {self.lacks(name)}")

    def lacks(self, name: str) -> str:
        """Message on a missing section, with the most similar one: that whose row of the table has the most values in common."""
        rows = {"pretrain": SCHEMES, "regimes": REGIMES}[self.kind]
        alike = {other: sum(map(operator.eq, vars(rows[name]).values(), vars(rows[other]).values())) for other in self}
        remedy = f"copy {self.kind}.{max(alike, key=alike.__getitem__)}" if alike else "print a complete file with: advml preset digits"
        return f"{self.kind} lacks the section {name}; {remedy}"
