"""Anyone's model, for `advml evaluate`: a folder of ours, a timm name with a safetensors file, or a Python function."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from advml import config
from advml.core.device import own_randomness
from advml.core.errors import UserError
from advml.core.io import sha256
from advml.data.datasets import Dataset
from advml.models import class_names
from advml.models import weights as files
from advml.models.adapter import REORDERED, WRAP, Foreign, fit
from advml.models.backbones import create_encoder
from advml.models.memory_format import place
from advml.models.network import Network, load_classifier, read_record
from advml.models.normalization import KNOWN, NONE, Constants, constants, published


@dataclass(frozen=True, eq=False)
class Given:
    """A model that somebody brought along.

    Attributes:
        name: for files and runs.
        network: maps float images (N, C, H, W) in [0, 1] to logits (N, K) in the order of the data's classes, in eval mode.
        digest: sha256 of its weights.
        origin: where it came from, and what was put between it and its use, for the record.
        scheme: of ours; None: unknown.
        data: digest of the data it was trained on; None: unknown.
        constants: of the normalisation in front of it; None: a network that we have trained, which knows its own.
        classes: names of the logits in the model's own order, where they are known.
        remarks: what its user should know, a line each.
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
class Wishes:
    """What is known of a model beside the model itself.

    Attributes:
        weights: of a timm model, a safetensors file with the names of timm or these behind a prefix.
        mean, std: of the normalisation that it expects, as `normalization.constants` reads them, "data" (of the training images) and
            "timm" (those published for a timm model, whose default they are) among the names.
        classes: names of its logits, as `class_names.read` reads them.
    """

    weights: Path | None = None
    mean: str | None = None
    std: str | None = None
    classes: str | None = None


def load(target: str, wishes: Wishes = Wishes(), *, spec: config.Model, dataset: Dataset, device: torch.device | str = "cpu") -> Given:
    """The model that `target` names, in eval mode, on the device.

    Args:
        target: a folder with model.json; a timm name, with `weights`; or `module:function`, importable from here, whose call without
            arguments returns a torch module.
        spec: `stem` and `options` of the timm model.
        dataset: the prepared data, on which it will be measured.
    Raises:
        UserError: there is no such model, or it does not map the prepared images to a logit per class.
    """
    if (Path(target) / "model.json").is_file():
        given = _ours(Path(target), wishes, dataset)
    elif re.fullmatch(r"[\w.]+:\w+", target):
        given = from_function(target)
    elif timm.is_model(target) and wishes.weights is not None:
        given = _timm(target, wishes.weights, spec, dataset)
    elif Path(target).suffix in files.PICKLES:
        raise UserError(files.how_to_convert(Path(target)))
    else:
        missing = "; its weights are missing: add --weights FILE.safetensors" if timm.is_model(target) else ""
        raise UserError(
            f"there is no model {target!r}{missing or '; give a folder with model.json, module:function, or a timm name with --weights'}"
        )
    return _fitted(given, wishes, dataset, device)


def of_module(
    network: nn.Module, wishes: Wishes = Wishes(), *, name: str = "model", dataset: Dataset, device: torch.device | str = "cpu"
) -> Given:
    """The same of a module in memory, which stays as it is but for eval mode, device and, of a network of ours, the layout of its weights.

    Raises:
        UserError: it does not map the images to a logit per class.
    """
    ours = isinstance(network, Network)
    given = Given(name, place(network, device) if ours else network, _digest(network), {"module": type(network).__qualname__})
    return _fitted(given if ours else replace(given, constants=NONE), wishes, dataset, device)


def _fitted(given: Given, wishes: Wishes, dataset: Dataset, device: torch.device | str) -> Given:
    """The model as it will be measured."""
    given = _placed(given, device)
    if given.constants is not None and "folder" not in given.origin:
        given = _adapted(given, wishes, dataset, device)
    return replace(given, origin=given.origin | {"behaviour": _behaviour(given, dataset, device)})


def _ours(folder: Path, wishes: Wishes, dataset: Dataset) -> Given:
    """A network that we have trained or imported; logits of the same classes in another order are put into the data's, in the classifier
    itself. Of an imported one the normalisation is what somebody has said."""
    record, network = read_record(folder), load_classifier(folder)
    name, data = Path(os.path.abspath(folder)).name, record.get("data", {}).get("digest")
    classes, remarks = class_names.read(wishes.classes, dataset.classes) if wishes.classes is not None else record.get("classes"), []
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
        remarks.append(f"{name} was trained on other data: test images may be among those it has learnt from")
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
    """What `module:function` returns, as it is.

    Raises:
        UserError: nothing, or no module that can be used.
    """
    module, _, function = target.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(module), function)
        network = make()
    except (Exception, SystemExit) as error:  # somebody's code may fail in any way; it is no failure of ours
        where = f" (it may lie in {here})" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{target} gives no model: {type(error).__name__}: {' '.join(str(error).split())}{where}") from None
    finally:
        sys.path.remove(here)
    if not isinstance(network, nn.Module):
        raise UserError(f"{target} returns {type(network).__name__}; it must return a torch module that maps images in [0, 1] to logits")
    if any(isinstance(value, UninitializedTensorMixin) for value in network.state_dict().values()):
        raise UserError(f"{target} returns a model with uninitialised parameters; call it on some images before it is returned")
    if any(isinstance(value, Tensor) and value.is_meta for value in network.state_dict().values()):
        raise UserError(f"{target} returns a model whose parameters have no values (device meta); load its weights before it is returned")
    origin = {"function": target, "mode": "training" if network.training else "eval"}  # that it came in; it is measured in eval mode
    return Given(target.replace(":", "-").replace(".", "-"), network, _digest(network), origin, constants=NONE)


def _placed(given: Given, device: torch.device | str) -> Given:
    """In eval mode, on the device."""
    try:
        given.network.eval()
        return replace(given, network=given.network.to(device))
    except Exception as error:  # of somebody's code, or weights that lie nowhere (meta)
        raise UserError(f"{given.name} cannot be moved to {device}: {' '.join(str(error).split())[:200]}") from None


def _adapted(given: Given, wishes: Wishes, dataset: Dataset, device: torch.device | str) -> Given:
    """Somebody's module behind what it lacks, which goes into the record."""
    known = KNOWN | {"data": Constants(dataset.mean, dataset.std)} | ({"timm": given.constants} if "timm" in given.origin else {})
    channels, name = dataset.shape[0], given.origin.get("function", given.name)
    before = (constants(wishes.mean, wishes.std, known=known, channels=channels) or given.constants).of_channels(channels)
    names = tuple(class_names.read(wishes.classes, dataset.classes)) if wishes.classes is not None else None
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
    """Also of a single number, such as a batch norm's count of batches."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _behaviour(given: Given, dataset: Dataset, device: torch.device | str) -> str:
    """A digest of the logits of two images: the same weights under other code are another model.

    Raises:
        UserError: the model does not take the images, or gives no logit per class.
    """
    images = (dataset.test.images[:2].float() / 255).to(device)
    try:
        with torch.no_grad(), own_randomness(0, images.device):
            logits = given.network(images)
    except UserError:  # of somebody's code: it says so itself
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
