"""What is studied: which models, on which images, under which threat, where and on what machine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from advml.config.values import Distinct, Epsilon, Images, Number, Section, Seed, Short, Some, Text, Whole, checked_options
from advml.names import RegimeName, SchemeName


class Grid(Section):
    """Which models the study trains. AT, Partial-AT and Full-AT share one adversarial pretraining."""

    schemes: Annotated[tuple[SchemeName, ...], Some, Distinct]
    standard_regimes: Annotated[tuple[Literal["ST"], ...], Short, Distinct]
    adversarial_regimes: Annotated[tuple[Literal["AT", "Partial-AT", "Full-AT"], ...], Short, Distinct]

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

    name: Literal["digits", "cifar10", "cifar100", "folder"]
    path: Text | None = None
    image_size: Annotated[Whole, Field(ge=4, le=4096)] | None = None
    channels: Literal[1, 3] | None = None
    layout: Literal["auto", "classes", "splits"] = "auto"  # of a folder: what its top folders are
    validation: Annotated[Number, Field(gt=0, lt=1)]
    test: Annotated[Number, Field(gt=0, lt=1)]
    max_train: Images | None = None
    max_test: Images | None = None
    skip_corrupt: bool = False
    duplicates: Literal["keep", "drop"] = "keep"  # images with the same pixels as another
    white_level: Annotated[Number, Field(ge=1e-6, le=2**32)] | None = None  # beyond 8 bits; None: found from the range in use
    seed: Seed = 0

    @model_validator(mode="after")
    def _combinations(self) -> Data:
        if self.name == "folder" and not self.path:
            raise ValueError("data.path is missing: data.name = 'folder' needs the folder of images, e.g. -S data.path=photos")
        if self.name == "folder" and self.image_size is None:
            raise ValueError("data.image_size is missing: data.name = 'folder' needs one size for all images, e.g. -S data.image_size=64")
        if self.validation + self.test >= 1:
            total = self.validation + self.test
            raise ValueError(f"data.validation + data.test = {total:g} leaves nothing to train on; keep the sum below 1")
        return self


Options = Annotated[dict[str, Any], Field(max_length=100), AfterValidator(checked_options)]


class Model(Section):
    """The backbone (any timm name) and the heads on top of it."""

    backbone: Annotated[str, Field(max_length=200, pattern=r"^[\w.:/@-]+$", description="a name of timm's, e.g. resnet18")]
    stem: Literal["small", "native"]
    options: Options = Field(default_factory=dict)
    projection_size: Annotated[Whole, Field(ge=1, le=65536)]
    normalize_logits: bool
    batch_norm: Literal["single", "dual"]


class ThreatModelSection(Section):
    """The ball that bounds the perturbation; images live in [0, 1], so 8/255 means eight grey levels."""

    norm: Literal["linf", "l2"]
    epsilon: Epsilon


class Tracking(Section):
    """Where MLflow keeps its history. Without `uri`: sqlite in mlflow.db, artifacts in mlruns/."""

    experiment: Annotated[Text, Field(max_length=250)]  # what MLflow's table holds
    uri: Text | None = None


class Runtime(Section):
    """The machine. `threads: 0` takes all cores; a fixed number makes results the same everywhere."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$", description="auto, cpu, cuda, cuda:1 or mps")] = "auto"
    threads: Annotated[Whole, Field(ge=0, le=1024)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"


class Cluster(Section):
    """A job of the queue that `advml repro --cluster slurm` (pbs, lsf, ...) submits to. Every job runs stages until all are done."""

    slots: Annotated[Whole, Field(ge=1, le=1024)] = 1  # stages at a time in a job
    cores: Annotated[Whole, Field(ge=1, le=1024)] = 2
    memory: Text = "8GB"
    gpus: Annotated[Whole, Field(ge=0, le=1024)] = 0
    walltime: Text | None = None
    queue: Text | None = None
    account: Text | None = None
    options: Options = Field(default_factory=dict)  # passed on to dask_jobqueue's class
