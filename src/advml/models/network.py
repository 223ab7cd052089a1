"""Networks: Normalize -> timm encoder -> heads. Images live in [0, 1]; normalisation is the first layer.

So epsilon has the same meaning in every file, and exported models can be attacked correctly with other tools.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from advml.core import ranks
from advml.core.device import own_randomness
from advml.core.errors import UserError
from advml.core.io import read_json, sha256
from advml.core.paths import Workspace
from advml.models.backbones import create_encoder
from advml.models.bn_folding import folded
from advml.models.layers import batch_norms, dual
from advml.models.memory_format import memory_format
from advml.models.micro_batches import in_parts

CPU = torch.device("cpu")  # device on which random weights are drawn


@dataclass(frozen=True)
class Architecture:
    """Everything needed to rebuild a network before its weights are loaded; stored in model.json."""

    backbone: str
    stem: str
    options: dict[str, Any]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int | None  # outputs of the classifier; None: no classifier
    projection_size: int | None  # outputs of the projection head; None: no projection head
    normalize_logits: bool
    dual_batch_norm: bool
    averaged_crops: int = 1  # number of crops over which the classifier's features are averaged; 1: the image itself


class Normalize(nn.Module):
    """Normalisation layer: (x - mean) / std per channel. The constants are buffers, saved with the weights."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Network(nn.Module):
    """Encoder with a classifier, a projection head, or both.

    `network(images)` gives logits (N, K), `network.embed(images)` unit-length projections (N, P); images are
    float (N, C, H, W) in [0, 1].
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.normalize = Normalize(a.mean, a.std)
        encoder, width = create_encoder(a.backbone, stem=a.stem, channels=a.channels, image_size=a.image_size, options=a.options)
        self.encoder = dual(encoder) if a.dual_batch_norm else encoder
        self.memory_format = memory_format(self.encoder)
        self.compiled = False  # whether torch.compile compiles the encoder, at the first images of each shape and mode
        self.micro_batch: int | None = None  # images per pass of the encoder, over all processes; None: all
        self.threat_model: dict[str, Any] | None = None  # norm and epsilon of the study that trained it; None: unknown
        self.width = width
        self.classifier = None if a.classes is None else nn.Linear(width, a.classes)
        self.projection_head = None
        if a.projection_size is not None:
            self.projection_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, a.projection_size))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the input images."""
        return self.architecture.channels, self.architecture.image_size, self.architecture.image_size

    def attach_classifier(self, classes: int, *, seed: int) -> None:
        """Add a new linear classifier to the encoder; its weights depend only on `seed`."""
        self.architecture = replace(self.architecture, classes=classes)
        with own_randomness(seed, CPU):
            self.classifier = nn.Linear(self.width, classes)

    def features(self, images: Tensor) -> Tensor:
        """Encoder output (N, D)."""
        images = self.normalize(images)
        if self.memory_format is torch.contiguous_format:  # clone, because the strides of one-channel images are valid in both formats
            images = images.clone(memory_format=self.memory_format)
        if self.micro_batch is None or ranks.batch_size(len(images)) <= self.micro_batch:
            with ranks.computing(*ranks.passes(len(images), 1, images.device)) if ranks.count() > 1 else contextlib.nullcontext():
                return self._features_at_once(images)
        return in_parts(self._features_at_once, images, size=self.micro_batch, layers=self.encoder)

    def _features_at_once(self, images: Tensor) -> Tensor:
        """Encoder output (N, D) of normalised images, in one pass."""
        return (_compiled if self.compiled and ranks.equal_shares() else _encode)(self.encoder, images)

    def classify(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D); of unit length if `normalize_logits`, as in the paper's protocol."""
        logits = self.classifier(features)
        return F.normalize(logits.float(), dim=1) if self.architecture.normalize_logits else logits

    def embed(self, images: Tensor) -> Tensor:
        """Unit-length projections (N, P)."""
        return F.normalize(self.projection_head(self.features(images)).float(), dim=1)

    def classifier_features(self, images: Tensor) -> Tensor:
        """Input of the classifier (N, D): features of the images, or their (differentiable) mean over fixed crops."""
        if (count := self.architecture.averaged_crops) == 1:
            return self.features(images)
        return self.features(torch.cat(five_crops(images))).unflatten(0, (count, -1)).mean(0)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.classifier_features(images))

    def run_all(self, images: Tensor) -> None:
        """Run the encoder and all heads, to record activations."""
        features = self.features(images)
        for head in (self.projection_head, self.classifier):
            if head is not None:
                head(features)


def five_crops(images: Tensor) -> list[Tensor]:
    """Crop centre and corners of the images (N, C, H, W), with three quarters of their side, enlarged to the size of the images."""
    size = images.shape[-2:]
    height, width = (max(1, 3 * side // 4) for side in size)
    bottom, right = size[0] - height, size[1] - width
    places = ((bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right))
    parts = (images[:, :, top : top + height, left : left + width] for top, left in places)
    return [F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in parts]


def _encode(encoder: nn.Module, images: Tensor) -> Tensor:
    return encoder(images)


# Compiles a function of the encoder, so that a copy of a network uses its own weights; with static shapes, which are faster, and the random
# numbers of an encoder that is not compiled, so that dropout does not depend on the parts of it that are compiled together.
_compiled = torch.compile(_encode, dynamic=False, options={"fallback_random": True})


def build(architecture: Architecture, *, seed: int) -> Network:
    """Build a network with random weights that depend only on `seed`; the global RNG is not changed."""
    with own_randomness(seed, CPU):
        return Network(architecture)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[dict[nn.Module, bool]]:
    """Context manager: the model is in eval mode inside; yields the mode of each of its modules, which is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield modes
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def under_attack(network: nn.Module, *, mode: str = "eval") -> Iterator[None]:
    """Context manager for attacks: parameters are frozen and dropout is off inside; everything is restored afterwards.

    In mode "eval", batch-norm statistics are constant. In mode "train", the paper's protocol, batch norms keep their modes: they update in
    a network under training, but not in a frozen encoder or in validation. Dropout and stochastic depth are off in both modes, so that
    an attack uses no random numbers but its own. Constant batch norms of a `Network` are `folded`, unless its encoder is compiled, which
    would have to be repeated for every folding.
    """
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with eval_mode(network) as modes:
        for layer in batch_norms(network) if mode == "train" else ():
            layer.training = modes[layer]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            folds = isinstance(network, Network) and not network.compiled
            with folded(network.encoder, network.image_shape) if folds else contextlib.nullcontext():
                yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


def save(network: Network, folder: Path, record: dict[str, Any]) -> str:
    """Write model.safetensors and model.json into `folder`; returns the sha256 of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    # clone, because safetensors refuses tensors that share storage (views, tied weights)
    weights.write_bytes(safetensors.torch.save({key: tensor.detach().clone().contiguous() for key, tensor in network.state_dict().items()}))
    digest = sha256(weights)
    record = {**record, "architecture": asdict(network.architecture), "digest": digest}
    (folder / "model.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return digest


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read model.json of a model's folder; raises UserError with the way to get the model if it is missing."""
    folder = Path(folder)
    if not (folder / "model.json").exists():
        raise UserError(f"{folder} contains no model (model.json is missing); train it with: dvc repro, or fetch it with: dvc pull")
    return read_json(folder / "model.json", remedy="restore it with: dvc checkout, or train it again with: dvc repro")


def is_whole(folder: Path) -> bool:
    """Whether `folder` contains a model.json and the weights that it describes."""
    try:
        return sha256(folder / "model.safetensors") == read_record(folder).get("digest")
    except (OSError, UserError):
        return False


def load_classifier(folder: str | Path) -> Network:
    """Load a network (see `load`), which must have a classifier.

    Raises:
        UserError: it cannot be loaded, or has no classifier.
    """
    network = load(folder)
    if network.classifier is None:
        raise UserError(f"{folder} contains a pretrained encoder without classifier; choose a model of {Workspace().models}")
    return network


def load(folder: str | Path) -> Network:
    """Rebuild a network from model.json and model.safetensors; every tensor must match.

    Raises:
        UserError: the folder contains no model, or its files are damaged or do not match each other.
    """
    folder = Path(folder)
    record = read_record(folder)
    try:
        weights = (folder / "model.safetensors").read_bytes()
        if sha256(weights) != record.get("digest"):
            raise ValueError("model.safetensors is not the file that model.json describes")
        stored = record["architecture"]
        network = build(Architecture(**{**stored, "mean": tuple(stored["mean"]), "std": tuple(stored["std"])}), seed=0)
        network.load_state_dict(safetensors.torch.load(weights), strict=True)
        network.threat_model = (record.get("parameters") or {}).get("threat_model")
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder} contains no usable model: {reason}; restore it with: dvc checkout, or train it again with: dvc repro"
        ) from None
    return network
