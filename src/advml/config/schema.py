"""Schema of params.yaml: type, default and explanation of every key.

A key without a default must be set by each study. A default is the neutral value: training and evaluation run as if the key did not
exist. It must never change, because DVC only tracks keys that are written in params.yaml. The explanations are the comments of
`advml preset` and the tooltips of editors.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from advml.config.phases import OF_TWO_TERMS, WITHOUT_EFFECT, Phase, Phases, TrainAttack
from advml.config.values import (
    AllOrNone,
    Batch,
    CorruptionName,
    Distinct,
    Epsilon,
    Images,
    MeasureName,
    Number,
    OneOrMany,
    Options,
    PositiveShare,
    Repeats,
    Section,
    Seed,
    Share,
    ShareRange,
    Short,
    Some,
    Space,
    Steps,
    StepSize,
    Strength,
    Text,
    Trials,
    Whole,
    Zoom,
    means,
)
from advml.core.paths import model_name
from advml.recipes import REGIMES, SCHEMES, RegimeName, SchemeName

# Models, images and threat model


def _after(pretraining: str) -> tuple[str, ...]:
    """Regimes that start from this pretraining."""
    return tuple(name for name, regime in REGIMES.items() if regime.pretraining == pretraining)


class Grid(Section):
    """Models that the study trains. AT, Partial-AT and Full-AT share one adversarial pretraining."""

    schemes: Annotated[tuple[SchemeName, ...], Some, Distinct] = means(
        ", ".join(scheme.described for scheme in SCHEMES.values() if not scheme.terms)
    )
    standard_regimes: Annotated[tuple[Literal[_after("st")], ...], Short, Distinct] = means("after a standard pretraining")
    adversarial_regimes: Annotated[tuple[Literal[_after("at")], ...], Short, Distinct] = means("after an adversarial pretraining")

    @model_validator(mode="after")
    def _some(self) -> Grid:
        if not self.regimes:
            raise ValueError("grid.standard_regimes and grid.adversarial_regimes are both empty; name a regime, e.g. [ST] or [AT, Full-AT]")
        return self

    @property
    def regimes(self) -> tuple[RegimeName, ...]:
        return self.standard_regimes + self.adversarial_regimes


class Data(Section):
    """Source of the images, and their splits."""

    name: Literal["digits", "cifar10", "cifar100", "folder"] = means("digits, cifar10, cifar100, folder")
    path: Text | None = means("cifar: folder of the download (null: data/raw); folder: folder of the images", None)
    image_size: Annotated[Whole, Field(ge=4, le=4096)] | None = means(
        "null: as stored; folder: side in pixels, images are resized and cropped", None
    )
    channels: Literal[1, 3] | None = means("null: as stored; 1 (grey) or 3 (RGB)", None)
    layout: Literal["auto", "classes", "splits"] = means(
        "folder: meaning of its subfolders: auto (decided by their names), classes, splits", "auto"
    )
    validation: Annotated[Number, Field(gt=0, lt=1)] = means("share of all images; images in neither validation nor test are for training")
    test: Annotated[Number, Field(gt=0, lt=1)] = means("share of all images, for data without a test split of their own")
    max_train: Images | None = means("keep at most this many training images, stratified; null: all", None)
    max_test: Images | None = means("keep at most this many test images, stratified; null: all", None)
    label_budget: PositiveShare = means("share of the training images whose labels are used, stratified; the others are unlabelled", 1.0)
    unlabelled: bool = means(
        "folder: true: also read images without labels, from a subfolder unlabelled, or from a folder without classes", False
    )
    skip_corrupt: bool = means("true: leave out unreadable images, and count them; false: list them and stop", False)
    duplicates: Literal["keep", "drop"] = means(
        "drop: keep one of several images with equal pixels (in test, if one is there), none if their labels differ", "keep"
    )
    white_level: Annotated[Number, Field(ge=1e-6, le=2**32)] | None = means(
        "value of white in images of more than 8 bits; null: the smallest 2^k - 1 that no value exceeds", None
    )
    seed: Seed = means("of the split", 0)

    @model_validator(mode="after")
    def _combinations(self) -> Data:
        if self.name == "folder" and not self.path:
            raise ValueError("data.path is missing: data.name = 'folder' needs the folder of images, e.g. -S data.path=photos")
        if self.name == "folder" and self.image_size is None:
            raise ValueError("data.image_size is missing: data.name = 'folder' needs one size for all images, e.g. -S data.image_size=64")
        if self.unlabelled and self.name != "folder":
            raise ValueError(f"data.unlabelled = true has no effect for data.name = {self.name!r}, only for folder; set data.label_budget")
        if self.validation + self.test >= 1:
            total = self.validation + self.test
            raise ValueError(f"data.validation + data.test = {total:g} leaves nothing to train on; keep the sum below 1")
        return self


class Model(Section):
    """The backbone (any timm name) and the heads on top of it."""

    backbone: Annotated[
        str, Field(max_length=200, pattern=r"^[\w.:/@-]+$", json_schema_extra={"form": "a name of timm's, e.g. resnet18"})
    ] = means("any timm name")
    stem: Literal["small", "native"] = means("small: 3x3, stride 1, no pooling, for images under about 64 pixels; native: that of timm")
    options: Options = means("passed on to timm.create_model, e.g. {drop_path_rate: 0.1}", default_factory=dict)
    projection_size: Annotated[Whole, Field(ge=1, le=65536)] = means("output k of the projection head d -> d -> k", 100)
    normalize_logits: bool = means("true: unit-norm logits before cross-entropy, as in the paper", False)
    batch_norm: Literal["single", "dual"] = means("single, dual (separate statistics for adversarial batches)", "single")
    init: Text | None = means("initial weights of pretraining: a model's folder or a safetensors file; null: random", None)


class View(Section):
    """Random view of an image, with parameters drawn per image.

    Geometry first (one resampling), then colour, as in SimCLR. A zero or null switches a transform off.
    """

    rotation: Annotated[Number, Field(ge=0, le=360)] = means("degrees, uniform in [-rotation, rotation]", 0.0)
    scale: Zoom = means("zoom factor, uniform", (1.0, 1.0))
    shift: Share = means("share of the image's side, uniform in [-shift, shift], both axes", 0.0)
    pad: Annotated[Whole, Field(ge=0, le=1000)] = means("pixels: zero-pad, then crop back at a random place", 0)
    resized_crop: ShareRange | None = means("share of the area; aspect ratio 3/4 to 4/3", None)
    flip: Share = means("probability of a horizontal flip", 0.0)
    brightness: Strength = means("factor uniform in [max(0, 1 - b), 1 + b]", 0.0)
    contrast: Strength = means("like brightness", 0.0)
    saturation: Strength = means("like brightness", 0.0)
    hue: Annotated[Number, Field(ge=0, le=0.5)] = means("shift of the hue, uniform in [-hue, hue] turns", 0.0)
    jitter: Share = means("probability that brightness, contrast, saturation and hue change", 1.0)
    grey: Share = means("probability of conversion to grey", 0.0)


class Views(Section):
    """Views in pretraining: of the supervised scheme and of the contrastive ones."""

    supervised: View = means("of SL")
    contrastive: View = means("of CL and SCL")


class ThreatModelSection(Section):
    """Ball that bounds the perturbation; images live in [0, 1], so 8/255 means eight grey levels."""

    norm: Literal["linf", "l2"] = means("linf, l2")
    epsilon: Epsilon = means("images live in [0, 1]")


# Evaluation


class EvaluationAttack(Section):
    """PGD attacks of `evaluate`, at epsilon and at half of it."""

    epsilon: Epsilon | None = means("null: threat_model.epsilon, as in training", None)
    batch_size: Batch = means("images in a batch")
    steps: Steps = means("of PGD")
    step_size: StepSize | None = means("null: 2.5 * epsilon / steps", None)
    restarts: Repeats = means("of PGD; the worst result counts", 1)
    random_start: bool = means("false: start at the image", True)
    objective: Literal["ce", "margin", "dlr"] = means("of the attack on the classifier: ce, margin, dlr", "ce")
    momentum: Annotated[Number, Field(ge=0, le=10)] = means("weight of earlier gradients in a step", 0.0)
    schedule: Literal["constant", "linear", "cosine"] = means("of the step size: constant, linear, cosine", "constant")
    keep: Literal["best", "last"] = means("best iterate of each image, or the last", "best")
    adversarial_images: Images | None = means("number of adversarial test images stored for represent and compare; null: all", None)
    seed: Seed = means("of random starts", 0)


class WorstCase(Section):
    """Cascade of attacks for `accuracy/worst_case`: each attacks the images that survive threat models I and II and earlier attacks."""

    attacks: Annotated[tuple[Literal["pgd-margin", "apgd-ce", "apgd-t", "fab-t", "square"], ...], Short, Distinct] = means(
        "in this order; []: none"
    )
    restarts: Repeats = means("of pgd-margin, with the steps of evaluate")
    steps: Steps = means("of APGD and FAB-T; AutoAttack's standard: 100")
    targets: Annotated[Whole, Field(ge=1, le=10_000)] = means("target classes of APGD-T and FAB-T, the likeliest first; standard: 9")
    queries: Annotated[Whole, Field(ge=1, le=10**6)] = means("of Square; standard: 5000")


# Minimum-norm attack -> norms that it supports; see `attacks.minimum_norm`.
MINIMAL_NORMS = {"fmn": ("linf", "l2"), "ddn": ("l2",), "cw": ("l2",)}


class Diagnostics(Section):
    """Probes for gradient masking on the first test images, which raise flags."""

    images: Annotated[Whole, Field(ge=0, le=10**9)] = means("number of test images, from the first; 0: no diagnostics")
    steps: Steps = means("of each PGD")
    shares: Annotated[tuple[Annotated[Number, Field(ge=1e-3, le=1000)], ...], Short, Distinct] = means(
        "epsilons of the security curve, as multiples of evaluate's"
    )
    minimal: Literal[tuple(MINIMAL_NORMS)] | None = means(
        "attack that measures distances to the nearest adversarial images: fmn, ddn, cw; needs advml[distances]", None
    )
    minimal_steps: Steps = means("of the attack `minimal`", 100)


class Corruptions(Section):
    """Common corruptions of the test images (as in CIFAR-C and ImageNet-C)."""

    names: Annotated[tuple[CorruptionName, ...], AllOrNone, Short, Distinct] = means("all, none, or a list: [fog, jpeg_compression]")
    severities: Annotated[tuple[Annotated[Whole, Field(ge=1, le=5)], ...], Field(min_length=1, max_length=5), Distinct] = means(
        "1 to 5; accuracies are means over them"
    )
    images: Images | None = means("number of test images, from the first; null: all", None)
    folder: Text | None = means(
        "published CIFAR-C files to read; null: data/raw/CIFAR-10-C if it exists, else corruptions are computed", None
    )
    seed: Seed = means("of random numbers in corruptions", 0)


_MODEL = rf"({'|'.join(SCHEMES)})-({'|'.join(REGIMES)})-s[0-9]{{1,10}}"


class Similarity(Section):
    """Measurements of `represent` and `compare`, on the images whose adversarial examples `evaluate` has stored."""

    layers: Annotated[tuple[Text, ...], OneOrMany, Some] = means('blocks, all, or patterns of names: [layer3.*, "*.act2"]')
    batch_size: Annotated[Whole, Field(ge=4, le=2**20)] = means(
        "images per CKA batch, at most a tenth of all: intervals are jackknives over batches"
    )
    gram: Literal["float32", "bfloat16"] = means("float32, bfloat16 (faster if the device supports it)", "float32")
    epsilon_studies: Text | None = means("folders of studies with other training epsilons, for claim 6: pipelines/epsilon/eps-*", None)
    measures: Annotated[tuple[MeasureName, ...], OneOrMany, Some, Distinct] = means(
        "cka, and optionally, on pooled features, cka-pooled, cka-rbf, procrustes, shape, rsa, svcca, knn, r2", ("cka",)
    )
    source: Annotated[str, Field(pattern=rf"^(own|{_MODEL})$", json_schema_extra={"form": "own, or a model's name, e.g. CL-AT-s0"})] = (
        means("compare: own: each model gets its own adversarial images; MODEL: all models get those of this one", "own")
    )
    probe_images: Images | None = means("number of training images of the linear probes; null: all", None)
    probe_strengths: Annotated[tuple[Annotated[Number, Field(ge=1e-9, le=1e9)], ...], Some, Distinct] = means(
        "inverse penalties of the linear probes, chosen on validation"
    )

    @model_validator(mode="after")
    def _measured(self) -> Similarity:
        if "cka" not in self.measures:
            raise ValueError(f"measures = {', '.join(self.measures)} lacks cka, the reference of all other measures; add it")
        return self


# Searches


class AttackSearch(Section):
    """Search of `advml tune attack`: the strongest attack within a fixed number of forward and backward passes per image."""

    trials: Trials = means("total number, over all workers and repeated commands")
    budget: Trials | None = means("steps * restarts that bound the passes of an attack; null: those of evaluate", None)
    images: Images | None = means("number of validation images; null: all", None)
    batch_size: Batch = means("images between two decisions whether to prune a trial")
    seed: Seed = means("of sampling and random starts", 0)
    space: Space = means("step_size in units of epsilon; restarts divide the steps that the budget allows")


class TrainingSearch(Section):
    """Search of `advml tune finetune` or `pretrain`: the training with the highest robust accuracy, given a floor on clean accuracy."""

    trials: Trials = means("total number, over all workers and repeated commands")
    clean_floor: Share = means("least clean validation accuracy of a winner")
    confirm: Annotated[Whole, Field(ge=0, le=1000)] = means("further seeds on which winner and default are compared", 0)
    seed: Seed = means("of sampling", 0)
    space: Space = means("keys of the phase, and view.* of its views; log, float, int: [low, high]; choice: a list")


class Tune(Section):
    """Searches of `advml tune`, which write proposals; only `advml tune apply` changes params.yaml."""

    attack: AttackSearch = means("strongest attack: advml tune attack CL-AT-s0")
    finetune: TrainingSearch = means("most robust fine-tuning above clean_floor: advml tune finetune CL Full-AT")
    pretrain: TrainingSearch = means("most robust encoder, with a linear head: advml tune pretrain CL at")


# The machine


class Tracking(Section):
    """MLflow's store and experiment."""

    experiment: Annotated[Text, Field(max_length=250)] = means("name in MLflow")  # the length of MLflow's column
    uri: Text | None = means("null: mlflow.db and mlruns/ beside this file", None)


class Runtime(Section):
    """The machine."""

    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$", json_schema_extra={"form": "auto, cpu, cuda, cuda:1 or mps"})
    ] = means("auto, cpu, cuda, cuda:1, mps", "auto")
    threads: Annotated[Whole, Field(ge=0, le=1024)] = means("0: all cores; a fixed number makes CPU results the same on every machine", 0)
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = means(
        "of products: fp32, tf32 (NVIDIA), bf16, fp16 (training only, with scaled losses; evaluation then uses fp32)", "fp32"
    )
    compile: bool = means("true: compile the encoder for training (torch.compile): minutes at first, faster steps, other rounding", False)
    micro_batch: Batch | None = means(
        "training: images per pass of the encoder; losses use the whole batch; costs a second forward pass; null: whole batch", None
    )
    deterministic: bool = means(
        "true: results on a GPU are reproducible, also after a resume, with slower kernels; false: faster, last bits vary", True
    )


class Cluster(Section):
    """Resources of a job that `advml repro --cluster slurm` (pbs, lsf, ...) submits. Each job runs stages until all are done."""

    slots: Annotated[Whole, Field(ge=1, le=1024)] = means("stages at a time in a job", 1)
    cores: Annotated[Whole, Field(ge=1, le=1024)] = means("of a job", 2)
    memory: Text = means("of a job", "8GB")
    gpus: Annotated[Whole, Field(ge=0, le=1024)] = means("of a job", 0)
    walltime: Text | None = means("of a job, e.g. 12:00:00; null: the queue's own", None)
    queue: Text | None = means("null: the default queue", None)
    account: Text | None = means("null: not given", None)
    options: Options = means("passed on to dask_jobqueue's class", default_factory=dict)


class Config(Section):
    """Content of params.yaml."""

    seeds: Annotated[tuple[Annotated[Seed, Field(strict=True)], ...], Some, Distinct] = means("one model per scheme, regime and seed")
    grid: Grid = means("schemes and regimes to train")
    data: Data = means("source of the images, and their splits")
    model: Model = means("the backbone, and the heads on top of it")
    temperature: Annotated[Number, Field(ge=1e-4, le=1e4)] = means("of the contrastive objective")
    views: Views = means("random augmentation during pretraining, drawn per image")
    threat_model: ThreatModelSection = means("the ball that bounds every perturbation")
    attack: TrainAttack = means("attack of adversarial training")
    pretrain: Annotated[dict[SchemeName, Phase], AfterValidator(partial(Phases, "pretrain"))] = means(
        "pretraining of each scheme, with and without attack; meaning of the keys: advml preset digits --full"
    )
    regimes: Annotated[dict[RegimeName, Phase], AfterValidator(partial(Phases, "regimes"))] = means(
        "fine-tuning: a head on the frozen encoder, in Full-AT the encoder too"
    )
    evaluate: EvaluationAttack = means("threat models I and II: PGD on the test images, at epsilon and half of it")
    worst_case: WorstCase = means("further attacks on images that survive threat models I and II")
    diagnostics: Diagnostics = means("probes for gradient masking, which raise flags on doubtful accuracies")
    corruptions: Corruptions = means("of the test images: noise, blur, weather, compression, as in CIFAR-C")
    similarity: Similarity = means("CKA between layers, and linear probes")
    tune: Tune = means("searches on validation, which propose values for the sections above")
    tracking: Tracking = means("MLflow")
    runtime: Runtime = means("the machine")
    cluster: Cluster = means("resources of a job of: advml repro --cluster slurm", default_factory=Cluster)

    @model_validator(mode="after")
    def _complete(self) -> Config:
        for kind, names in (("pretrain", self.grid.schemes), ("regimes", self.grid.regimes)):
            if missing := [name for name in names if name not in getattr(self, kind)]:
                raise ValueError(getattr(self, kind).lacks(missing[0]))
        radii = {"threat_model": self.threat_model.epsilon, "evaluate": self.evaluate.epsilon}
        for key, epsilon in (radii | {key: phase.epsilon for key, phase in self.phases.items()}).items():
            if self.threat_model.norm == "linf" and epsilon is not None and epsilon > 1:
                raise ValueError(
                    f"{key}.epsilon = {epsilon:g} exceeds the whole range of a pixel; "
                    "images live in [0, 1], so write 8/255 for eight grey levels"
                )
        source, models = self.similarity.source, [model_name(*one) for one in product(self.grid.schemes, self.grid.regimes, self.seeds)]
        if source != "own" and source not in models:
            raise ValueError(f"similarity.source = {source} is not a model of the grid; choose from own, {', '.join(models)}")
        minimal, norm = self.diagnostics.minimal, self.threat_model.norm
        if minimal and norm not in MINIMAL_NORMS[minimal]:
            able = ", ".join(name for name, norms in MINIMAL_NORMS.items() if norm in norms)
            raise ValueError(f"diagnostics.minimal = {minimal} does not work in threat_model.norm = {norm}; choose from {able}, null")
        return self

    @model_validator(mode="after")
    def _phases(self) -> Config:
        """Refuse values that have no effect or contradict each other."""
        for key, phase in self.phases.items():
            if phase.epochs == 0 and (key.startswith("regimes.") or not self.model.init):
                remedy = "set it to 1 or more" + ("" if key.startswith("regimes.") else ", or name an encoder: model.init")
                raise ValueError(f"{key}.epochs = 0 leaves the weights random; {remedy}")
            if phase.schedule == "onecycle" and phase.warmup:
                raise ValueError(
                    f"{key}.warmup = {phase.warmup:g} doubles the warm-up of onecycle; set it to 0, or {key}.schedule = cosine"
                )
            if phase.loss == "trades" and not self.attack.random_start:
                raise ValueError(
                    f"{key}.loss = trades needs attack.random_start = true: at the image itself the gradient of its divergence is zero"
                )
            kind = self.attack_kind(key)
            if kind == "fast" and not self.attack.random_start:
                raise ValueError(f"{key} trains by attack.kind = fast, which needs a random start; set attack.random_start = true")
            if kind == "free" and self.attack.batch_norm == "train":
                raise ValueError(f"{key} trains by attack.kind = free, whose attack has no passes of its own; set attack.batch_norm = eval")
            if phase.weight_annealing and (phase.clean_weight, phase.adversarial_weight) != (1, 1):
                raise ValueError(f"{key}.weight_annealing sets both weights; leave clean_weight and adversarial_weight at 1")
            for name, why in self.without_effect(key).items():
                if (value := getattr(phase, name)) != (neutral := Phase.model_fields[name].default):
                    raise ValueError(f"{key}.{name} = {_plain(value)} has no effect: {why}; set it to {_plain(neutral)}")
        return self

    def attack_kind(self, key: str) -> str | None:
        """Kind of attack (attack.kind) in a phase such as `pretrain.CL` or `regimes.Full-AT`; None: it is not attacked."""
        kind, _, name = key.partition(".")
        attacked = kind == "pretrain" or REGIMES[name].attacked
        return (getattr(self, kind)[name].attack_kind or self.attack.kind) if attacked else None

    def without_effect(self, key: str) -> dict[str, str]:
        """Keys without effect in a phase, in general or with its kind of attack -> the reason."""
        return WITHOUT_EFFECT[key] | (OF_TWO_TERMS if self.attack_kind(key) == "free" else {})

    @property
    def phases(self) -> dict[str, Phase]:
        """All phases by their full keys, e.g. `pretrain.CL`, `regimes.Full-AT`."""
        return {f"{kind}.{name}": phase for kind in ("pretrain", "regimes") for name, phase in getattr(self, kind).items()}

    @property
    def attacked_epsilon(self) -> float:
        """Epsilon of `evaluate`'s attacks."""
        return self.evaluate.epsilon or self.threat_model.epsilon


def _plain(value: Any) -> str:
    """Value in YAML's notation."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')
