"""What is studied: which models, on which images, under which threat, where and on what machine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from advml.config.values import Count, Distinct, Number, Positive, Section, Whole
from advml.names import RegimeName, SchemeName


class Grid(Section):
    """Which models the study trains. AT, Partial-AT and Full-AT share one adversarial pretraining."""

    schemes: Annotated[tuple[SchemeName, ...], Field(min_length=1), Distinct]
    standard_regimes: Annotated[tuple[Literal["ST"], ...], Distinct]
    adversarial_regimes: Annotated[tuple[Literal["AT", "Partial-AT", "Full-AT"], ...], Distinct]

    @property
    def regimes(self) -> tuple[RegimeName, ...]:
        return self.standard_regimes + self.adversarial_regimes


class Data(Section):
    """Where the images come from and how they are split."""

    name: Literal["digits", "cifar10", "cifar100", "folder"]
    path: str | None = None
    image_size: Annotated[Whole, Field(ge=4)] | None = None
    channels: Literal[1, 3] | None = None
    layout: Literal["auto", "classes", "splits"] = "auto"  # of a folder: what its top folders are
    validation: Annotated[Number, Field(gt=0, lt=1)]
    test: Annotated[Number, Field(gt=0, lt=1)]
    max_train: Count | None = None
    max_test: Count | None = None
    skip_corrupt: bool = False
    duplicates: Literal["keep", "drop"] = "keep"  # images with the same pixels as another
    white_level: Annotated[Number, Field(ge=1e-6, le=2**32)] | None = None  # beyond 8 bits; None: found from the range in use
    seed: Annotated[Whole, Field(ge=0)] = 0

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


class Model(Section):
    """The backbone (any timm name) and the heads on top of it."""

    backbone: str
    stem: Literal["small", "native"]
    options: dict[str, Any] = Field(default_factory=dict)  # timm is the judge of them
    projection_size: Count
    normalize_logits: bool
    batch_norm: Literal["single", "dual"]


class ThreatModelSection(Section):
    """The ball that bounds the perturbation; images live in [0, 1], so 8/255 means eight grey levels."""

    norm: Literal["linf", "l2"]
    epsilon: Positive


class Tracking(Section):
    """Where MLflow keeps its history. Without `uri`: sqlite in mlflow.db, artifacts in mlruns/."""

    experiment: str
    uri: str | None = None


class Runtime(Section):
    """The machine. `threads: 0` takes all cores; a fixed number makes results the same everywhere."""

    device: str = "auto"
    threads: Annotated[Whole, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"


class Cluster(Section):
    """A job of the queue that `advml repro --cluster slurm` (pbs, lsf, ...) submits to. Every job runs stages until all are done."""

    slots: Count = 1  # stages at a time in a job
    cores: Count = 2
    memory: str = "8GB"
    gpus: Annotated[Whole, Field(ge=0)] = 0
    walltime: str | None = None
    queue: str | None = None
    account: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)  # passed on to dask_jobqueue's class
