"""The training of params.yaml: the attack inside it, its phases, and which keys of a phase do nothing in it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from advml.config.values import Epsilon, Number, PositiveShare, Section, Share, Steps, StepSize, Whole, means
from advml.core.errors import UserError
from advml.recipes import REGIMES, SCHEMES

Epochs = Annotated[Whole, Field(ge=1, le=100_000)]
AttackKind = Literal["pgd", "free", "fast"]


class TrainAttack(Section):
    """The attack inside training. Without `step_size` a step is 2.5 * epsilon / steps; of free training epsilon, of fast 1.25 epsilon."""

    kind: AttackKind = means(
        "pgd; free: `steps` replays of a batch update weights and perturbation at once; fast: one step from a random start", "pgd"
    )
    steps: Steps = means("of PGD; free: replays of a batch; fast: of the PGD that validates")
    step_size: StepSize | None = means("null: 2.5 * epsilon / steps", None)
    random_start: bool = means("false: from the image itself; free starts at 0 once, and keeps its perturbation", True)
    batch_norm: Literal["eval", "train"] = means("mode of the model while it is attacked: eval, train", "eval")


class Phase(Section):
    """One training phase: how long, with which optimiser, and what is kept."""

    epochs: Annotated[Whole, Field(ge=0, le=100_000)] = means(
        "passes over the training images; of pretrain 0: model.init as it is; free training divides them by its replays"
    )
    batch_size: Annotated[Whole, Field(ge=2, le=2**20)] = means("images in a batch")
    optimizer: Literal["adamw", "adam", "sgd"] = means("adamw, adam, sgd")
    learning_rate: Annotated[Number, Field(ge=1e-30, le=1e30)] = means(
        "highest of the schedule"
    )  # optimisers multiply it, and float32 ends at 3e38
    weight_decay: Annotated[Number, Field(ge=0, le=1000)] = means("of all weights that learn")
    schedule: Literal["constant", "cosine", "onecycle"] = means("of the learning rate: constant, cosine, onecycle")
    warmup: Share = means("share of all steps, linear from 0; onecycle has its own", 0.0)
    layer_decay: PositiveShare = means("block k from the top learns at layer_decay^k of the rate; 1: all alike", 1.0)
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = means("of cross-entropy; CL and SCL have none", 0.0)
    loss: Literal["two-term", "trades"] = means(
        "adversarial term: two-term (cross-entropy), trades (divergence from x); CL and SCL have their own", "two-term"
    )
    clean_weight: Annotated[Number, Field(ge=0, le=1e6)] = means("of the clean term beside the attacked one; 0: it is not computed", 1.0)
    adversarial_weight: Annotated[Number, Field(ge=0, le=1e6)] = means("of the attacked term beside the clean one", 1.0)
    weight_annealing: Epochs | None = means("DynACL: every so many epochs the attacked term gains weight; null: constant weights", None)
    attacked: Literal["image", "views"] | None = means(
        "what is perturbed: image, views (CL: ACL's dual stream); null: views of EMP, else the image", None
    )
    epsilon: Epsilon | None = means("radius of the attack in this phase; null: threat_model.epsilon", None)
    epsilon_warmup: Share = means("share of all steps over which the radius, and the step with it, rises from 0", 0.0)
    attack_kind: AttackKind | None = means("null: attack.kind", None)
    attack_steps: Steps | None = means("null: attack.steps", None)
    views: Annotated[Whole, Field(ge=2, le=1000)] | None = means("of an image in a batch; null: CL and SCL 2, EMP 16", None)
    averaged_crops: Literal[1, 5] = means("what the classifier sees: 1: the image; 5: mean features of its centre and corners", 1)
    view_annealing: Epochs | None = means("DynACL: every so many epochs the views weaken; null: full strength throughout", None)
    frozen_statistics: bool = means("batch norms keep the statistics of pretraining, their weights learn; Full-AT alone", False)
    gradient_clip: Annotated[Number, Field(ge=1e-9, le=1e9)] | None = means("largest norm of the gradient; null: any", None)
    average: Literal["none", "ema", "swa"] = means("of the weights, which is what is validated and kept: none, ema, swa", "none")
    average_decay: Annotated[Number, Field(gt=0, lt=1)] = means("ema: share of the old average at every step", 0.99)
    average_start: Annotated[Number, Field(ge=0, lt=1)] = means("swa: share of all epochs before the first one that counts", 0.75)
    keep: Literal["best", "last"] = means("epoch whose weights are kept: best on validation, last", "best")


OF_THE_ATTACK = (
    *("loss", "clean_weight", "adversarial_weight", "weight_annealing", "attacked", "epsilon", "epsilon_warmup"),
    *("attack_kind", "attack_steps"),
)


def _without_effect() -> dict[str, dict[str, str]]:
    """Phase -> the keys that it has no use for, and why; they must keep their defaults."""
    from_scratch = {"frozen_statistics": "pretraining starts without statistics to keep"}
    from_scratch |= {"averaged_crops": "the classifiers of the study are made in fine-tuning"}
    no_classifier = dict.fromkeys(("label_smoothing", "loss"), "the contrastive objective has no cross-entropy")
    clean = dict.fromkeys(OF_THE_ATTACK, "this regime fine-tunes on clean images alone")
    head_only = dict.fromkeys(("layer_decay", "frozen_statistics"), "this regime learns a head, and the encoder is fixed")
    one_view = {"views": "cross-entropy is of one view of an image"}
    unaugmented = dict.fromkeys(("attacked", "views", "view_annealing"), "fine-tuning learns on the images themselves")
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
    """The phases of a study by scheme or regime. A phase that params.yaml leaves out is an error only where it is used."""

    def __init__(self, kind: str, phases: dict[str, Phase]) -> None:
        super().__init__(phases)
        self.kind = kind

    def __missing__(self, name: str) -> Phase:
        raise UserError(f"params.yaml lacks the section {self.kind}.{name}; print one with: advml preset digits")
