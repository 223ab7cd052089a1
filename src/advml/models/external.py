"""Load any model, to evaluate it or to compare its layers: from a folder of advml, a timm name with a weights file, or a function."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from advml import config
from advml.core.device import own_randomness
from advml.core.errors import UserError
from advml.core.io import sha256
from advml.core.paths import Workspace, find_model
from advml.data.datasets import Dataset
from advml.models import class_names
from advml.models import weights as files
from advml.models.adapter import REORDERED, WRAP, Foreign, fit
from advml.models.backbones import create_encoder
from advml.models.memory_format import place
from advml.models.network import Network, load_classifier, read_record
from advml.models.network import load as load_network
from advml.models.normalization import KNOWN, NONE, Constants, constants, published


@dataclass(frozen=True, eq=False)
class Given:
    """A model to be evaluated.

    Attributes:
        name: for files and MLflow runs.
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K) in the order of the data's classes, in eval mode.
        digest: sha256 of its weights.
        origin: for the record: where it was loaded from, and how its input and output are adapted.
        scheme: a key of `recipes.SCHEMES`; None: unknown.
        data: digest of the data it was trained on; None: unknown.
        constants: of the normalisation in front of it; None: a network trained by advml, which normalises images itself.
        classes: names of the logits in the model's own order; None: unknown.
        remarks: notes for the user, one line each.
    """

    name: str
    network: nn.Module
    digest: str
    origin: dict[str, Any]
    scheme: str | None = None
    data: str | None = None
    constants: Constants | None = None
    classes: tuple[str, ...] | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadOptions:
    """The user's options on how to load and use a model.

    Attributes:
        weights: safetensors file for a timm model; its names are timm's, possibly behind a prefix.
        mean, std: of the normalisation that the model expects, in the notation of `normalization.constants`; further names are "data"
            (of the training images) and "timm" (published for the timm model, and its default).
        classes: names of its logits, in the notation of `class_names.read`.
    """

    weights: Path | None = None
    mean: str | None = None
    std: str | None = None
    classes: str | None = None


def load(
    target: str, options: LoadOptions = LoadOptions(), *, spec: config.Model, dataset: Dataset, device: torch.device | str = "cpu"
) -> Given:
    """Load the model that `target` names, in eval mode, onto the device.

    Args:
        target: a folder with model.json; a timm name, with `weights`; or `module:function`, importable from the current folder, which
            returns a torch module when called without arguments.
        spec: `stem` and `options` of the timm model.
        dataset: the prepared data for the evaluation.
    Raises:
        UserError: the model does not exist, or does not map the prepared images to one logit per class.
    """
    if (Path(target) / "model.json").is_file():
        given = _ours(Path(target), options, dataset)
    elif re.fullmatch(r"[\w.]+:\w+", target):
        given = from_function(target)
    elif timm.is_model(target) and options.weights is not None:
        given = _timm(target, options.weights, spec, dataset)
    elif Path(target).suffix in files.PICKLES:
        raise UserError(files.how_to_convert(Path(target)))
    else:
        missing = "; its weights are missing: add --weights FILE.safetensors" if timm.is_model(target) else ""
        raise UserError(
            f"there is no model {target!r}{missing or '; give a folder with model.json, module:function, or a timm name with --weights'}"
        )
    return _fitted(given, options, dataset, device)


def of_module(
    network: nn.Module, options: LoadOptions = LoadOptions(), *, name: str = "model", dataset: Dataset, device: torch.device | str = "cpu"
) -> Given:
    """Wrap a torch module in memory for evaluation.

    The module is switched to eval mode and moved to the device; a network of advml also gets the memory format of that device.

    Raises:
        UserError: the module does not map the images to one logit per class.
    """
    ours = isinstance(network, Network)
    given = Given(name, place(network, device) if ours else network, _digest(network), {"module": type(network).__qualname__})
    return _fitted(given if ours else replace(given, constants=NONE), options, dataset, device)


def _fitted(given: Given, options: LoadOptions, dataset: Dataset, device: torch.device | str) -> Given:
    """Move the model to the device, adapt it to the data where needed, and record its behaviour."""
    given = _placed(given, device)
    if given.constants is not None and "folder" not in given.origin:
        given = _adapted(given, options, dataset, device)
    return replace(given, origin=given.origin | {"behaviour": _behaviour(given, dataset, device)})


def _ours(folder: Path, options: LoadOptions, dataset: Dataset) -> Given:
    """Load a network that advml has trained or imported, with the classifier's rows permuted to the data's order of classes.

    `constants` is set for imported models only, whose normalisation was given by the user.
    """
    record, network = read_record(folder), load_classifier(folder)
    name, data = Path(os.path.abspath(folder)).name, record.get("data", {}).get("digest")
    classes, remarks = class_names.read(options.classes, dataset.classes) if options.classes is not None else record.get("classes"), []
    if classes:
        order = class_names.positions(classes, dataset.classes, of=name, logits=network.architecture.classes)
        with torch.no_grad():
            for tensor in network.classifier.parameters():
                tensor.copy_(tensor[order])
        remarks += [REORDERED.format(name)] if order != sorted(order) else []
    if (theirs := tuple(record.get("input", dataset.shape))) != dataset.shape:
        shapes = [" x ".join(map(str, shape)) for shape in (theirs, dataset.shape)]
        remarks.append(f"{name} was trained on {shapes[0]} images; those of the prepared data are {shapes[1]}")
    if data and data != dataset.digest:
        remarks.append(f"{name} was trained on other data, which may contain test images of this study")
    names = tuple(classes) if classes else None
    expects = Constants(network.architecture.mean, network.architecture.std) if "origin" in record else None
    about = {"constants": expects, "classes": names, "remarks": tuple(remarks)}
    return Given(name, network, record["digest"], {"folder": str(folder)}, record.get("scheme"), data, **about)


def _timm(name: str, file: Path, spec: config.Model, dataset: Dataset) -> Given:
    channels, size, _ = dataset.shape
    classes = len(dataset.classes)
    network, _ = create_encoder(name, stem=spec.stem, channels=channels, image_size=size, options=spec.options, classes=classes)
    content, remarks = files.read(file), ()
    try:
        prefix = files.fill(network, content)
    except ValueError as error:
        hint = "" if spec.stem == "native" else "; a network as timm makes it has its own stem: -S model.stem=native"
        what = f"{name} with {classes} classes, {channels} channels and stem {spec.stem}"
        raise UserError(f"{file} does not fit {what}{hint} ({error})") from None
    origin = {"timm": name, "weights": str(file), "stem": spec.stem, "options": spec.options}
    if prefix:
        origin |= {"prefix": prefix}
        remarks = (f"{file}: the prefix {prefix!r} of the weights' names was stripped",)
    return Given(f"{name}-{file.stem}", network, sha256(content), origin, constants=published(network), remarks=remarks)


def from_function(target: str) -> Given:
    """Call `module:function` and return its model, without adaptation.

    Raises:
        UserError: the call fails, or does not return a torch module with initialised parameters.
    """
    module, _, function = target.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(module), function)
        network = make()
    except (Exception, SystemExit) as error:  # third-party code may raise anything, and that is a mistake of its author
        where = f" (modules are also looked for in {here})" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{target} gives no model: {type(error).__name__}: {' '.join(str(error).split())}{where}") from None
    finally:
        sys.path.remove(here)
    if not isinstance(network, nn.Module):
        raise UserError(f"{target} returns {type(network).__name__}; it must return a torch module that maps images in [0, 1] to logits")
    if any(isinstance(value, UninitializedTensorMixin) for value in network.state_dict().values()):
        raise UserError(f"{target} returns a model with uninitialised parameters; call it on some images before it is returned")
    if any(isinstance(value, Tensor) and value.is_meta for value in network.state_dict().values()):
        raise UserError(f"{target} returns a model whose parameters have no values (device meta); load its weights before it is returned")
    origin = {"function": target, "mode": "training" if network.training else "eval"}  # it is evaluated in eval mode
    return Given(target.replace(":", "-").replace(".", "-"), network, _digest(network), origin, constants=NONE)


def _placed(given: Given, device: torch.device | str) -> Given:
    """Switch the model to eval mode and move it to the device."""
    try:
        given.network.eval()
        return replace(given, network=given.network.to(device))
    except Exception as error:  # raised by third-party code, or for weights without values (device meta)
        raise UserError(f"{given.name} cannot be moved to {device}: {' '.join(str(error).split())[:200]}") from None


def _adapted(given: Given, options: LoadOptions, dataset: Dataset, device: torch.device | str) -> Given:
    """Wrap a third-party module with normalisation, class order and other adaptations, and add these to the record."""
    known = KNOWN | {"data": Constants(dataset.mean, dataset.std)} | ({"timm": given.constants} if "timm" in given.origin else {})
    channels, name = dataset.shape[0], given.origin.get("function", given.name)
    before = (constants(options.mean, options.std, known=known, channels=channels) or given.constants).of_channels(channels)
    names = tuple(class_names.read(options.classes, dataset.classes)) if options.classes is not None else None
    adapter, remarks = fit(given.network, name, constants=before, names=names, dataset=dataset, device=device)
    return replace(
        given,
        network=Foreign(adapter.around(given.network), name).eval(),
        origin=given.origin | {"mean": list(before.mean), "std": list(before.std)} | adapter.as_record(),
        constants=before,
        classes=names,
        remarks=(*given.remarks, *remarks),
    )


def _digest(network: nn.Module) -> str:
    """sha256 of the names and bytes of all tensors."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode())
        found.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())  # a module's extra state may be anything
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    """Bytes of a tensor of any shape, scalars included (such as a batch norm's count of batches)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _behaviour(given: Given, dataset: Dataset, device: torch.device | str) -> str:
    """Digest of the logits of two images, which tells apart models with equal weights and different code.

    Raises:
        UserError: the model does not accept the images, or does not return one logit per class.
    """
    images = dataset.test.images[:2]
    images = (images if images.is_floating_point() else images.float() / 255).to(device)
    try:
        with torch.no_grad(), own_randomness(0, images.device):
            logits = given.network(images)
    except UserError:  # raised by the adapter, with a message of its own
        raise
    except Exception as error:
        raise UserError(
            f"{given.name} does not take {'x'.join(map(str, dataset.shape))} images: {' '.join(str(error).split())[:300]}"
        ) from None
    found, wanted = tuple(logits.shape), (len(images), len(dataset.classes))
    if found != wanted:
        wrap = f"; if its logits are elsewhere, wrap it: {WRAP}" if "reading" in given.origin else ""
        raise UserError(f"{given.name} gives {found} for {len(images)} images; the prepared data need {wanted}: a logit per class{wrap}")
    if not logits.isfinite().any():
        raise UserError(f"{given.name} gives nothing but NaN or infinities for the first test images: there is nothing to measure")
    return sha256(_bytes(logits.float()))[:16]


# For a comparison of layers: any network, with the size and normalisation of its images; its outputs may have any form

COMMON = (224, 32)  # image sizes in pixels, tried for a network that does not state its own


@dataclass(frozen=True, eq=False)
class Viewed:
    """A network in eval mode, whose layers are compared.

    Attributes:
        shape: (C, H, W) of its input images.
        digest: sha256 of its weights.
        origin: folder, function or file that it was loaded from.
        constants: mean and std by which images are normalised before the network; None: it normalises them itself.
    """

    name: str
    network: nn.Module
    shape: tuple[int, int, int]
    digest: str
    origin: str
    constants: Constants | None = None

    def prepared(self, images: Tensor) -> Tensor:
        """Convert images (n, C, H, W) in [0, 1] to the network's input: normalised, in the dtype of its weights."""
        if self.constants is None:
            return images
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in self.constants)
        return ((images - mean) / std).to(_dtype(self.network))


def _dtype(network: nn.Module) -> torch.dtype:
    return next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.float32)


def is_folder(target: str) -> bool:
    """Whether `target` of `view` names a model's folder, as opposed to a function or a timm network."""
    return Path(target).exists() or not {":", "="} & set(target)


def view(
    target: str, workspace: Workspace, *, shape: tuple[int, int, int] | None, mean: str | None, std: str | None, device: torch.device
) -> Viewed:
    """Load the network that `target` names onto the device.

    Args:
        target: a model that advml has trained, by name or folder; `module:function`; or a timm name with its weights,
            resnet18=FILE.safetensors.
        shape: of the study's images, for networks that do not state their input size; None: no prepared images.
        mean, std: of the normalisation that a network from a function expects, see `normalization.constants`; ignored for timm
            networks, whose published constants are used.
    Raises:
        UserError: the network does not exist, or fails on images of every size that was tried.
    """
    if is_folder(target):
        folder = find_model(workspace, target)
        record, network = read_record(folder), load_network(folder)
        return Viewed(folder.absolute().name, place(network, device), network.image_shape, record["digest"], str(folder))
    if "=" in target:
        found, (mean, std) = _viewed_timm(*target.split("=", 1)), (None, None)
    else:
        given = from_function(target)
        found = Viewed(given.name, given.network, (0, 0, 0), given.digest, target, NONE)
    network = found.network.to(device).eval()
    channels = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), shape[0] if shape else 3)
    usual = found.constants if mean is None and std is None else constants(mean, std, known=KNOWN, channels=channels)
    found = replace(found, network=network, shape=(channels, 0, 0), constants=usual.of_channels(channels))
    return _sized(found, _sizes(network, shape), device)


def _viewed_timm(name: str, file: str) -> Viewed:
    """Load a timm network, with as many outputs and input channels as the weights in the file have."""
    if not timm.is_model(name):
        raise UserError(f"there is no timm model {name!r}, as in {name}={file}")
    path = Path(file)
    content = files.read(path)
    stored, plain = safetensors.torch.load(content), timm.create_model(name, pretrained=False)
    prefix = files.prefix_of(stored, plain.state_dict())
    wanted = {}
    for key, option, axis in (("classifier", "num_classes", 0), ("first_conv", "in_chans", 1)):
        layer = plain.default_cfg.get(key)
        tensor = stored.get(f"{prefix}{layer}.weight") if isinstance(layer, str) else None
        wanted[option] = tensor.shape[axis] if tensor is not None and tensor.ndim > axis else 0 if option == "num_classes" else 3
    network = timm.create_model(name, pretrained=False, **wanted)
    try:
        files.fill(network, content)
    except ValueError as error:
        raise UserError(f"{path} does not fit timm's {name} ({error})") from None
    return Viewed(f"{name}-{path.stem}", network, (0, 0, 0), sha256(content), f"{name}={file}", published(network))


def _sizes(network: nn.Module, shape: tuple[int, int, int] | None) -> Sequence[int]:
    """Image sizes to try, in pixels per side, the likeliest first: stated by the network, of the study's images, common ones."""
    config = getattr(network, "config", None)  # of Hugging Face
    said = (
        getattr(network, "image_size", None),  # of torchvision's transformers
        (getattr(network, "default_cfg", None) or {}).get("input_size", (0, None))[-1],  # of timm
        getattr(config, "image_size", None),
        shape[-1] if shape else None,
        *COMMON,
    )
    return list(dict.fromkeys(size for size in said if isinstance(size, int)))


def _sized(viewed: Viewed, sizes: Sequence[int], device: torch.device) -> Viewed:
    """Set `shape` to the first of the sizes at which the network runs without error."""
    reasons = []
    for size in sizes:
        shape = (viewed.shape[0], size, size)
        try:
            with torch.no_grad(), own_randomness(0, device):
                viewed.network(viewed.prepared(torch.full((2, *shape), 0.5, device=device)))
            return replace(viewed, shape=shape)
        except Exception as error:  # third-party code may raise anything
            reasons.append(f"{'x'.join(map(str, shape))}: {' '.join(str(error).split())[:100]}")
    raise UserError(f"{viewed.name} takes no images of the sizes tried ({'; '.join(reasons)}); give it an attribute image_size")
