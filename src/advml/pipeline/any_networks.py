"""Run `compare` and `represent` for models outside of the study's grid, also for any networks, on its test images or a folder of photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from advml import tracking
from advml.core.device import generator_for
from advml.core.errors import UserError
from advml.core.io import sha256
from advml.core.messages import first_of, tell
from advml.core.paths import find_model, is_reserved
from advml.core.progress import Bar
from advml.data import images as pictures
from advml.models.external import Viewed, is_folder, view
from advml.pipeline.context import Context
from advml.pipeline.stages.compare import adversarial_images, checked, network_in, write
from advml.pipeline.stages.represent import measure
from advml.similarity import compare
from advml.similarity.cka import SMALLEST_BATCH
from advml.similarity.compare import Comparison, Panel, all_pairs
from advml.similarity.layers import left_out
from advml.similarity.represent import CLEAN, ESTIMATOR, View

MOST = 2048  # largest number of photos
SHOWN = 3  # number of names in a note on modules left out


def run(context: Context, targets: Sequence[str], *, images: Path | None, mean: str | None, std: str | None, out: Path) -> Comparison:
    """Compare the layers of every pair of networks, or of a single network with itself; writes into `out`.

    Only clean images are used, each network at its own size, because attacks need a classifier of the prepared data's classes; probes need
    labels, and are left out.

    Args:
        targets: see `view`.
        images: a folder of photos; None: the prepared test images.
        mean, std: see `view`.
    Raises:
        UserError: a network or the images cannot be loaded, two networks have the same name, or no network needs `mean` and `std`.
    """
    if (mean or std) and all(is_folder(target) or "=" in target for target in targets):
        raise UserError(f"--mean and --std are for module:function; {', '.join(targets)} have a known normalisation; leave them out")
    spec, device = context.config.similarity, context.machine.device
    shape = None if images else context.dataset.shape
    viewed = [view(target, context.workspace, shape=shape, mean=mean, std=std, device=device) for target in targets]
    names = [each.name for each in viewed]
    if len(set(names)) < len(names):
        raise UserError(f"networks in a comparison need different names, but these are {', '.join(names)}")
    source = _Photos(images) if images else _Prepared(context)
    pixels = {each.shape[0::2]: source.read(*each.shape[0::2]) for each in viewed}
    kept = source.whole
    views = {(each.name, CLEAN): _view(each, pixels[each.shape[0::2]][kept], context) for each in viewed}
    for each in viewed:
        _say_what_is_left_out(each, views[each.name, CLEAN](slice(0, 2)))
    with Bar(f"compare {len(viewed)} networks", total=2) as bar:
        bar.begin("similarity")
        panels = all_pairs(names) if len(names) > 1 else [Panel("layers", *names, *names)]
        compared = compare.compare({each.name: each.network for each in viewed}, views, len(kept), panels, spec)
        bar.begin("figures")
        described = {"estimator": ESTIMATOR, "gram": spec.gram, "n": sum(compared.similarity.sizes)}
        described |= context.made_by({"similarity": spec.model_dump(mode="json")}) | {"images_of": source.digest}
        described["networks"] = {
            each.name: {"origin": each.origin, "digest": each.digest, "input": each.shape, "normalised": each.constants} for each in viewed
        }
        write(out, compared, described | compare.describe(compared))
    tracking.log_result(context.tracking, out)
    return compared


def represent_model(context: Context, model: str) -> dict[str, float]:
    """Attack the test images as `evaluate` would, measure the model, and write its record and files; returns the metrics.

    Args:
        model: name or folder of a model that advml has trained in another study, or imported.
    """
    folder = find_model(context.workspace, model)
    if is_reserved(folder.name):
        raise UserError(f"{folder.name} is a name of this study, whose results would be overwritten; copy the folder to another name")
    record, network = checked(context, folder, strict=False), network_in(context, folder)
    attacked = adversarial_images(context, folder, record, network, anew=True)
    return measure(context, folder.name, record["digest"], network, attacked)


def _view(viewed: Viewed, pixels: Tensor, context: Context) -> View:
    return lambda place: viewed.prepared(context.machine.images(pixels[place]))


def _say_what_is_left_out(viewed: Viewed, images: Tensor) -> None:
    if missing := left_out(viewed.network, images):
        tell(f"note: {viewed.name}: modules without one output per image are left out: {first_of(missing, SHOWN)}")


class _Photos:
    """Images of a folder and its subfolders; a fixed random subset if there are more than MOST."""

    def __init__(self, folder: Path) -> None:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in pictures.SUFFIXES)
        if len(found) < SMALLEST_BATCH:
            raise UserError(f"--images {folder} contains {len(found)} images; {SMALLEST_BATCH} or more are needed")
        if len(found) > MOST:
            tell(f"note: {MOST} of the {len(found)} images in {folder} are compared, drawn with seed 0")
            found = sorted(found[place] for place in torch.randperm(len(found), generator=generator_for("photos", 0))[:MOST])
        self.folder, self.paths, self.unreadable, self.digest = folder, found, dict[int, str](), sha256(*found)

    def read(self, channels: int, size: int) -> Tensor:
        """uint8 (n, C, size, size)."""
        read = pictures.read_files(self.paths, size=size, channels=channels, white=None)
        for place in read.unreadable.keys() - self.unreadable.keys():
            tell(f"note: {self.paths[place]} is left out: {read.unreadable[place]}")
        self.unreadable |= read.unreadable
        return torch.from_numpy(read.images)

    @property
    def whole(self) -> list[int]:
        """Indices of the images that could be read."""
        return [place for place in range(len(self.paths)) if place not in self.unreadable]


class _Prepared:
    """Test images of the study, scaled to a network's size."""

    def __init__(self, context: Context) -> None:
        self.images, self.digest = context.dataset.test.images, context.dataset.digest

    def read(self, channels: int, size: int) -> Tensor:
        """uint8 (n, C, size, size)."""
        return torch.from_numpy(pictures.fit_arrays(self.images.numpy(), size=size, channels=channels))

    @property
    def whole(self) -> list[int]:
        """All."""
        return list(range(len(self.images)))
