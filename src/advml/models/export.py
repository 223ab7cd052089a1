"""Export a network for other tools: a folder that timm loads without advml, and an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from advml.core.errors import Failure, UserError
from advml.models.backbones import create_encoder, timm_arguments
from advml.models.checkpoints import BRANCH
from advml.models.network import Network

TOLERANCE = 1e-4  # relative and absolute difference of logits between two engines
WEIGHTS, GRAPH = "model.safetensors", "model.onnx"
FILES = {WEIGHTS, GRAPH, "config.json"}


def to_timm(network: Network, folder: Path, images: Tensor) -> list[str]:
    """Write model.safetensors and timm's config.json; returns the three lines of Python that load them.

    Like all networks of timm, the loaded network expects (images - mean) / std; the lines end with these constants. It returns logits,
    or features if there is no classifier. Dual batch norms become single ones with the adversarial branch, which inference uses.

    Args:
        network: in eval mode.
        folder: an existing folder.
        images: (N, C, H, W) in [0, 1], on which both networks are compared.
    Raises:
        UserError: timm's classifier of this family is not a linear layer on the features.
        Failure: the outputs of the networks differ.
    """
    a = network.architecture
    about = {"stem": a.stem, "channels": a.channels, "image_size": a.image_size, "options": a.options, "classes": a.classes or 0}
    theirs, _ = create_encoder(a.backbone, **about)
    weights = {BRANCH.sub(".", name): value for name, value in network.encoder.state_dict().items() if ".clean." not in name}
    if network.classifier is not None:
        weights |= {f"{theirs.default_cfg['classifier']}.{name}": value for name, value in network.classifier.state_dict().items()}
    try:
        theirs.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{a.backbone} has another kind of classifier in timm: {' '.join(str(error).split())[:200]}") from None
    with torch.no_grad():
        features = network.features(images)
        wanted = features if network.classifier is None else network.classifier(features)
        check_equal(theirs.eval()(network.normalize(images)), wanted, what="timm's network")
    arguments = timm_arguments(a.backbone, **about)
    config = {"mean": a.mean, "std": a.std, "input_size": network.image_shape, "num_classes": about["classes"]}
    theirs.pretrained_cfg = {**theirs.pretrained_cfg, **config}
    kept = {key: value for key, value in arguments.items() if key != "num_classes"}
    save_for_hf(theirs, str(folder), model_args=kept, safe_serialization=True)
    with torch.device("meta"):
        built = timm.create_model(a.backbone, **arguments)
    told = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return [
        "import safetensors.torch, timm, torch",
        "; ".join([f"model = timm.create_model({a.backbone!r}{told})", *_surgery(theirs, built)]),
        f"safetensors.torch.load_model(model, {str(folder / WEIGHTS)!r}); model.eval()  # of (images - {list(a.mean)}) / {list(a.std)}",
    ]


def _surgery(wanted: nn.Module, built: nn.Module) -> list[str]:
    """Python statements that convert `built` to `wanted`, for each layer whose printed form differs."""
    statements = []
    for name, layer in wanted.named_modules():
        if any(layer.children()) or repr(layer) == repr(built.get_submodule(name)):
            continue
        own = type(layer).__module__.startswith("torch.nn.")
        statements.append(
            f"model.set_submodule({name!r}, torch.nn.{layer!r})" if own else f"model.get_submodule({name!r}).stride = {layer.stride}"
        )
    return statements


def to_onnx(network: Network, folder: Path, images: Tensor) -> None:
    """Write model.onnx, from `images` (N, C, H, W) in [0, 1] with any N to `logits` (N, K), and compare it with torch on all images.

    Raises:
        ImportError: the extra `onnx` is not installed.
        Failure: ONNX Runtime gives other logits.
    """
    import onnxruntime
    import onnxscript  # noqa: F401 - needed by torch's exporter, whose own error is less clear

    network = network.cpu()
    inputs, path = images[:2].cpu(), folder / GRAPH
    batch: dict[str, Any] = {"images": {0: torch.export.Dim("batch", min=1)}}
    torch.onnx.export(
        network,
        (inputs,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=batch,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for some in images.cpu().split(256):
            (found,) = session.run(None, {"images": some.numpy()})
            check_equal(torch.from_numpy(found), network(some), what="ONNX Runtime")


def check_equal(found: Tensor, wanted: Tensor, *, what: str) -> None:
    """Raise Failure if outputs (N, K) differ by more than rounding."""
    if not torch.allclose(found.float(), wanted.float(), rtol=TOLERANCE, atol=TOLERANCE):
        raise Failure(f"{what} gives other outputs than the model, by up to {(found - wanted).abs().max():.3g}; nothing was exported")
