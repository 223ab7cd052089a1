"""Every key of params.yaml: its kind of value, its default, and what it means.

A key without a default is a choice that each study writes down. A default is the neutral value, under which training and evaluation run
as if the key did not exist; it must never change, because DVC sees the keys that params.yaml writes, and no others. The explanations
are the comments of `advml preset` and what an editor shows.
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

# Models, images and the threat


def _after(pretraining: str) -> tuple[str, ...]:
    """The regimes that start from this pretraining."""
    return tuple(name for name, regime in REGIMES.items() if regime.pretraining == pretraining)


class Grid(Section):
    """Which models the study trains. AT, Partial-AT and Full-AT share one adversarial pretraining."""

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
    """Where the images come from and how they are split."""

    name: Literal["digits", "cifar10", "cifar100", "folder"] = means("digits, cifar10, cifar100, folder")
    path: Text | None = means("cifar: where the download is (null: data/raw); folder: the images", None)
    image_size: Annotated[Whole, Field(ge=4, le=4096)] | None = means(
        "null: as stored; folder: side in pixels, images are resized and cropped", None
    )
    channels: Literal[1, 3] | None = means("null: as stored; 1 (grey) or 3 (RGB)", None)
    layout: Literal["auto", "classes", "splits"] = means(
        "folder: what its top folders are: auto (goes by their names), classes, splits", "auto"
    )
    validation: Annotated[Number, Field(gt=0, lt=1)] = means("share of all images; the rest after validation and test is for training")
    test: Annotated[Number, Field(gt=0, lt=1)] = means("share of all images, where the data come without a test split")
    max_train: Images | None = means("keep at most this many training images, stratified; null: all", None)
    max_test: Images | None = means("keep at most this many test images, stratified; null: all", None)
    label_budget: PositiveShare = means("share of the training images whose labels are used, stratified; the others are unlabelled", 1.0)
    unlabelled: bool = means("folder: true: read images without labels too, of a folder unlabelled, or of one without classes", False)
    skip_corrupt: bool = means("true: leave unreadable images out and count them; false: list them and stop", False)
    duplicates: Literal["keep", "drop"] = means(
        "drop: of images with equal pixels one stays, in test if it is there; under two labels none", "keep"
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
            raise ValueError(f"data.unlabelled = true has no effect: data.name = {self.name!r} is no folder; set data.label_budget instead")
        if self.validation + self.test >= 1:
            total = self.validation + self.test
            raise ValueError(f"data.validation + data.test = {total:g} leaves nothing to train on; keep the sum below 1")
        return self


class Model(Section):
    """The backbone (any timm name) and the heads on top of it."""

    backbone: Annotated[
        str, Field(max_length=200, pattern=r"^[\w.:/@-]+$", json_schema_extra={"form": "a name of timm's, e.g. resnet18"})
    ] = means("any timm name")
    stem: Literal["small", "native"] = means("small: 3x3, stride 1, no pooling, for images under about 64 pixels; native")
    options: Options = means("passed on to timm.create_model, e.g. {drop_path_rate: 0.1}", default_factory=dict)
    projection_size: Annotated[Whole, Field(ge=1, le=65536)] = means("output k of the projection head d -> d -> k", 100)
    normalize_logits: bool = means("true: unit-norm logits before cross-entropy, as in the paper", False)
    batch_norm: Literal["single", "dual"] = means("single, dual (separate statistics for adversarial batches)", "single")
    init: Text | None = means("weights that pretraining starts from: a model's folder or a safetensors file; null: random ones", None)


class View(Section):
    """One random view of an image; every sample of a batch draws its own parameters.

    Geometry first (one resampling), then colour, as in SimCLR. A zero or null switches a part off.
    """

    rotation: Annotated[Number, Field(ge=0, le=360)] = means("degrees, uniform in [-rotation, rotation]", 0.0)
    scale: Zoom = means("zoom factor, uniform", (1.0, 1.0))
    shift: Share = means("share of the image's side, uniform in [-shift, shift], both axes", 0.0)
    pad: Annotated[Whole, Field(ge=0, le=1000)] = means("pixels: zero-pad, then crop back at a random place", 0)
    resized_crop: ShareRange | None = means("share of the area; aspect ratio 3/4 to 4/3", None)
    flip: Share = means("probability of a horizontal flip", 0.0)
    brightness: Strength = means("factor uniform in [max(0, 1 - b), 1 + b]", 0.0)
    contrast: Strength = means("the same of contrast", 0.0)
    saturation: Strength = means("the same of saturation", 0.0)
    hue: Annotated[Number, Field(ge=0, le=0.5)] = means("shift of the hue, uniform in [-hue, hue] turns", 0.0)
    jitter: Share = means("probability that the four above apply", 1.0)
    grey: Share = means("probability of turning grey", 0.0)


class Views(Section):
    """The views of pretraining: one kind for the supervised scheme, one for the contrastive ones."""

    supervised: View = means("of SL")
    contrastive: View = means("of CL and SCL")


class ThreatModelSection(Section):
    """The ball that bounds the perturbation; images live in [0, 1], so 8/255 means eight grey levels."""

    norm: Literal["linf", "l2"] = means("linf, l2")
    epsilon: Epsilon = means("images live in [0, 1]")


# Evaluation


class EvaluationAttack(Section):
    """The attacks of `evaluate`, at epsilon and at half of it."""

    epsilon: Epsilon | None = means("null: that of training, threat_model.epsilon", None)
    batch_size: Batch = means("images in a batch")
    steps: Steps = means("of PGD")
    step_size: StepSize | None = means("null: 2.5 * epsilon / steps", None)
    restarts: Repeats = means("of PGD; the worst counts", 1)
    random_start: bool = means("false: from the image itself", True)
    objective: Literal["ce", "margin", "dlr"] = means("of the attack on the classifier: ce, margin, dlr", "ce")
    momentum: Annotated[Number, Field(ge=0, le=10)] = means("share of the earlier directions in a step", 0.0)
    schedule: Literal["constant", "linear", "cosine"] = means("of the step size: constant, linear, cosine", "constant")
    keep: Literal["best", "last"] = means("best iterate of each image, or the last", "best")
    adversarial_images: Images | None = means(
        "test images whose adversarial examples are stored for represent and compare; null: all", None
    )
    seed: Seed = means("of random starts", 0)


class WorstCase(Section):
    """The attacks behind `accuracy/worst_case`, each aimed at what threat models I and II and those before it have left standing."""

    attacks: Annotated[tuple[Literal["pgd-margin", "apgd-ce", "apgd-t", "fab-t", "square"], ...], Short, Distinct] = means(
        "in this order; []: none"
    )
    restarts: Repeats = means("of pgd-margin, with the steps of evaluate")
    steps: Steps = means("of APGD and FAB-T; AutoAttack's standard: 100")
    targets: Annotated[Whole, Field(ge=1, le=10_000)] = means("classes that APGD-T and FAB-T aim at, the likeliest first; standard: 9")
    queries: Annotated[Whole, Field(ge=1, le=10**6)] = means("of Square; standard: 5000")


# Attack that looks for the nearest adversarial example -> norms that it works in; see `attacks.minimum_norm`.
MINIMAL_NORMS = {"fmn": ("linf", "l2"), "ddn": ("l2",), "cw": ("l2",)}


class Diagnostics(Section):
    """Probes for gradient masking on the first test images; their findings are flags beside the figures."""

    images: Annotated[Whole, Field(ge=0, le=10**9)] = means("the first test images; 0: no diagnostics")
    steps: Steps = means("of each PGD")
    shares: Annotated[tuple[Annotated[Number, Field(ge=1e-3, le=1000)], ...], Short, Distinct] = means(
        "epsilons of the security curve, as multiples"
    )
    minimal: Literal[tuple(MINIMAL_NORMS)] | None = means(
        "distances of nearest adversarial images, needs advml[distances]: fmn, ddn, cw", None
    )
    minimal_steps: Steps = means("of that search", 100)


class Corruptions(Section):
    """Common corruptions of the test images (CIFAR-C, ImageNet-C): which, and how strong."""

    names: Annotated[tuple[CorruptionName, ...], AllOrNone, Short, Distinct] = means("all, none, or a list: [fog, jpeg_compression]")
    severities: Annotated[tuple[Annotated[Whole, Field(ge=1, le=5)], ...], Field(min_length=1, max_length=5), Distinct] = means(
        "1 to 5; figures are means over them"
    )
    images: Images | None = means("the first test images; null: all", None)
    folder: Text | None = means("published CIFAR-C files, read instead; null: computed, unless data/raw/CIFAR-10-C is there", None)
    seed: Seed = means("of their noise", 0)


_MODEL = rf"({'|'.join(SCHEMES)})-({'|'.join(REGIMES)})-s[0-9]{{1,10}}"


class Similarity(Section):
    """What `represent` and `compare` measure, on the images whose adversarial examples `evaluate` has stored."""

    layers: Annotated[tuple[Text, ...], OneOrMany, Some] = means('blocks, all, or patterns of names: [layer3.*, "*.act2"]')
    batch_size: Annotated[Whole, Field(ge=4, le=2**20)] = means("images per CKA batch, or a tenth of them all: intervals leave batches out")
    gram: Literal["float32", "bfloat16"] = means("float32, bfloat16 (faster where the device multiplies it; elsewhere the same)", "float32")
    epsilon_studies: Text | None = means("studies of other training epsilons, for claim 6: pipelines/epsilon/eps-*", None)
    measures: Annotated[tuple[MeasureName, ...], OneOrMany, Some, Distinct] = means(
        "cka, and beside it cka-pooled, cka-rbf, procrustes, shape, rsa, svcca, knn, r2, on pooled features", ("cka",)
    )
    source: Annotated[str, Field(pattern=rf"^(own|{_MODEL})$", json_schema_extra={"form": "own, or a model's name, e.g. CL-AT-s0"})] = (
        means("compare: each model sees its own adversarial images, or all see those of this model", "own")
    )
    probe_images: Images | None = means("training images for the linear probes; null: all", None)
    probe_strengths: Annotated[tuple[Annotated[Number, Field(ge=1e-9, le=1e9)], ...], Some, Distinct] = means(
        "inverse penalties of the linear probes, chosen on validation"
    )

    @model_validator(mode="after")
    def _measured(self) -> Similarity:
        if "cka" not in self.measures:
            raise ValueError(f"measures = {', '.join(self.measures)} lacks cka, which everything else is compared with; add it")
        return self


# Searches


class AttackSearch(Section):
    """`advml tune attack`: the strongest attack within a fixed number of forward and backward passes per image."""

    trials: Trials = means("in all, of all workers and repeated commands")
    budget: Trials | None = means("steps * restarts of the default, whose passes no attack exceeds; null: of evaluate", None)
    images: Images | None = means("validation images; null: all", None)
    batch_size: Batch = means("images between two decisions whether a trial is worth going on with")
    seed: Seed = means("of sampling and random starts", 0)
    space: Space = means("step_size counts in epsilons; restarts share the steps that the budget allows")


class TrainingSearch(Section):
    """`advml tune finetune` and `advml tune pretrain`: the most robust training that keeps a clean accuracy."""

    trials: Trials = means("in all, of all workers and repeated commands")
    clean_floor: Share = means("least clean validation accuracy of a winner")
    confirm: Annotated[Whole, Field(ge=0, le=1000)] = means("further seeds on which winner and default are compared", 0)
    seed: Seed = means("of sampling", 0)
    space: Space = means("keys of the phase, view.*: of its views; log, float, int: low to high; choice: a list")


class Tune(Section):
    """What `advml tune` searches. It writes proposals; only `advml tune apply` changes params.yaml."""

    attack: AttackSearch = means("the attack that breaks most: advml tune attack CL-AT-s0")
    finetune: TrainingSearch = means("robust without giving up clean accuracy: advml tune finetune CL Full-AT")
    pretrain: TrainingSearch = means("the same of an encoder under a linear head: advml tune pretrain CL at")


# The machine


class Tracking(Section):
    """Where MLflow keeps its history."""

    experiment: Annotated[Text, Field(max_length=250)] = means("name in MLflow")  # as much as MLflow's table holds
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
    compile: bool = means("true: training compiles the encoder by torch.compile; minutes at first, faster steps, other rounding", False)
    micro_batch: Batch | None = means(
        "training: images that pass the encoder at once, losses see the whole batch; costs a second forward pass; null: all", None
    )
    deterministic: bool = means(
        "true: GPUs repeat their bits, and a resumed run those of an unbroken one, by slower kernels; false: faster, last bits vary", True
    )


class Cluster(Section):
    """A job of the queue that `advml repro --cluster slurm` (pbs, lsf, ...) submits to. Every job runs stages until all are done."""

    slots: Annotated[Whole, Field(ge=1, le=1024)] = means("stages at a time in a job", 1)
    cores: Annotated[Whole, Field(ge=1, le=1024)] = means("of a job", 2)
    memory: Text = means("of a job", "8GB")
    gpus: Annotated[Whole, Field(ge=0, le=1024)] = means("of a job", 0)
    walltime: Text | None = means("of a job, e.g. 12:00:00; null: the queue's own", None)
    queue: Text | None = means("null: the default one", None)
    account: Text | None = means("null: none is named", None)
    options: Options = means("passed on to dask_jobqueue's class", default_factory=dict)


class Config(Section):
    """All of params.yaml."""

    seeds: Annotated[tuple[Annotated[Seed, Field(strict=True)], ...], Some, Distinct] = means("one model per scheme, regime and seed")
    grid: Grid = means("the rows and columns of the result table")
    data: Data = means("where the images come from and how they are split")
    model: Model = means("the backbone, and the heads on top of it")
    temperature: Annotated[Number, Field(ge=1e-4, le=1e4)] = means("of the contrastive objective")
    views: Views = means("random augmentation during pretraining, drawn per image")
    threat_model: ThreatModelSection = means("the ball that bounds every perturbation")
    attack: TrainAttack = means("inside adversarial training")
    pretrain: Annotated[dict[SchemeName, Phase], AfterValidator(partial(Phases, "pretrain"))] = means(
        "of each scheme, with or without attack; what the keys mean: advml preset digits --full"
    )
    regimes: Annotated[dict[RegimeName, Phase], AfterValidator(partial(Phases, "regimes"))] = means(
        "fine-tuning: a head on the frozen encoder, in Full-AT the encoder too"
    )
    evaluate: EvaluationAttack = means("threat models I and II: PGD on the test images, at epsilon and half of it")
    worst_case: WorstCase = means("what threat models I and II leave standing is attacked again")
    diagnostics: Diagnostics = means("flags that say when a robust figure should not be believed")
    corruptions: Corruptions = means("of the test images: noise, blur, weather, compression, as in CIFAR-C")
    similarity: Similarity = means("CKA between layers, and linear probes")
    tune: Tune = means("searches on validation; winners are proposals for the sections above")
    tracking: Tracking = means("MLflow")
    runtime: Runtime = means("the machine")
    cluster: Cluster = means("jobs of: advml repro --cluster slurm", default_factory=Cluster)

    @model_validator(mode="after")
    def _complete(self) -> Config:
        for kind, names in (("pretrain", self.grid.schemes), ("regimes", self.grid.regimes)):
            if missing := [name for name in names if name not in getattr(self, kind)]:
                raise ValueError(f"{kind} lacks the section {missing[0]}; it needs {', '.join(names)}")
        radii = {"threat_model": self.threat_model.epsilon, "evaluate": self.evaluate.epsilon}
        for key, epsilon in (radii | {key: phase.epsilon for key, phase in self.phases.items()}).items():
            if self.threat_model.norm == "linf" and epsilon is not None and epsilon > 1:
                raise ValueError(
                    f"{key}.epsilon = {epsilon:g} exceeds the whole range of a pixel; "
                    "images live in [0, 1], so write 8/255 for eight grey levels"
                )
        source, models = self.similarity.source, [model_name(*one) for one in product(self.grid.schemes, self.grid.regimes, self.seeds)]
        if source != "own" and source not in models:
            raise ValueError(f"similarity.source = {source} is no model of the grid; choose from own, {', '.join(models)}")
        minimal, norm = self.diagnostics.minimal, self.threat_model.norm
        if minimal and norm not in MINIMAL_NORMS[minimal]:
            able = ", ".join(name for name, norms in MINIMAL_NORMS.items() if norm in norms)
            raise ValueError(f"diagnostics.minimal = {minimal} does not work in threat_model.norm = {norm}; choose from {able}, null")
        return self

    @model_validator(mode="after")
    def _phases(self) -> Config:
        """Refuse values that would count twice, or have no effect."""
        for key, phase in self.phases.items():
            if phase.epochs == 0 and (key.startswith("regimes.") or not self.model.init):
                remedy = "set it to 1 or more" + ("" if key.startswith("regimes.") else ", or name an encoder: model.init")
                raise ValueError(f"{key}.epochs = 0 leaves random weights as they are; {remedy}")
            if phase.schedule == "onecycle" and phase.warmup:
                raise ValueError(
                    f"{key}.warmup = {phase.warmup:g} doubles the warm-up of onecycle; set it to 0, or {key}.schedule = cosine"
                )
            if phase.loss == "trades" and not self.attack.random_start:
                raise ValueError(
                    f"{key}.loss = trades needs attack.random_start = true: at the image itself its divergence has no gradient to follow"
                )
            kind = self.attack_kind(key)
            if kind == "fast" and not self.attack.random_start:
                raise ValueError(f"{key} trains by attack.kind = fast, whose step begins at random; set attack.random_start = true")
            if kind == "free" and self.attack.batch_norm == "train":
                raise ValueError(
                    f"{key} trains by attack.kind = free, which has no passes of the attack alone; set attack.batch_norm = eval"
                )
            if phase.weight_annealing and (phase.clean_weight, phase.adversarial_weight) != (1, 1):
                raise ValueError(f"{key}.weight_annealing sets both weights; leave clean_weight and adversarial_weight at 1")
            for name, why in self.without_effect(key).items():
                if (value := getattr(phase, name)) != (neutral := Phase.model_fields[name].default):
                    raise ValueError(f"{key}.{name} = {_plain(value)} has no effect: {why}; set it to {_plain(neutral)}")
        return self

    def attack_kind(self, key: str) -> str | None:
        """How the phase `pretrain.CL` or `regimes.Full-AT` is attacked, a key of attack.kind; None: it never is."""
        kind, _, name = key.partition(".")
        attacked = kind == "pretrain" or REGIMES[name].attacked
        return (getattr(self, kind)[name].attack_kind or self.attack.kind) if attacked else None

    def without_effect(self, key: str) -> dict[str, str]:
        """Keys of a phase that do nothing in it, and why: whatever the configuration, or under the attack that it has."""
        return WITHOUT_EFFECT[key] | (OF_TWO_TERMS if self.attack_kind(key) == "free" else {})

    @property
    def phases(self) -> dict[str, Phase]:
        """All phases by their keys, e.g. `pretrain.CL`, `regimes.Full-AT`."""
        return {f"{kind}.{name}": phase for kind in ("pretrain", "regimes") for name, phase in getattr(self, kind).items()}

    @property
    def attacked_epsilon(self) -> float:
        """The radius of `evaluate`'s attacks."""
        return self.evaluate.epsilon or self.threat_model.epsilon


def _plain(value: Any) -> str:
    """As YAML writes it."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')
