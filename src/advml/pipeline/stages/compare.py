"""Stage `compare [MODELS]`: CKA and other measures between the layers of different models, on clean and adversarial images."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advml import tracking
from advml.core.errors import UserError
from advml.core.io import sha256, to_json, write_atomically
from advml.core.messages import tell
from advml.core.paths import find_model, home_of, model_name
from advml.core.progress import Bar
from advml.data import adversarial
from advml.data.adversarial import AdversarialImages
from advml.data.folder_layout import few
from advml.evaluation.attack_suite import threat_model_2
from advml.evaluation.metrics import describe_kept
from advml.evaluation.run_attacks import kept_images
from advml.figures.layers import Heatmap, heatmaps
from advml.figures.model_map import model_map
from advml.figures.style import to_png
from advml.models.external import is_folder
from advml.models.memory_format import place
from advml.models.network import Network, load_classifier, read_record
from advml.pipeline.context import Context
from advml.similarity import compare
from advml.similarity.represent import ESTIMATOR, to_npz, views_of_split

OWN = "own"  # similarity.source: each model gets its own adversarial images
NOTHING = "the grid has no two trained models that the paper compares"


def run(context: Context, *, chosen: tuple[str, ...] = (), out: Path | None = None) -> compare.Comparison | None:
    """Write `cka.npz`, `cka.json` and a figure per kind of input into `out`; returns the comparison.

    If the grid has no two models to compare, `cka.json` states this, and the result is None.

    Args:
        chosen: names or folders of models to compare pairwise; empty: the pairs of the paper.
        out: output folder; None: `reports/compare`, which the report reads.
    """
    workspace, spec = context.workspace, context.config.similarity
    folders = {folder.name: folder for folder in (find_model(workspace, model) for model in chosen)}
    if chosen and (len(folders) < 2 or len(folders) < len(chosen)):
        raise UserError("compare needs at least two models with different names")
    home = workspace.reports / "compare"
    out = out or home
    of_study = out.resolve() == home.resolve()
    if chosen and of_study:
        raise UserError(f"{home} is for the comparisons of the grid, which the report reads; give another --out")
    found = compare.all_pairs(list(folders)) if chosen else _grid_panels(context, folders)
    if found and not chosen:
        folders |= _others(context)
    if not found:
        _nothing(out)
        if of_study:
            write_atomically(workspace.record("compare", "panels"), to_json({"digests": {}, "cka": None}, indent=1))
        return None
    if spec.source != OWN and spec.source not in folders:  # a model of the grid without a panel
        folders[spec.source] = find_model(workspace, spec.source)
    records = {name: checked(context, folder, strict=not chosen) for name, folder in folders.items()}
    networks = {name: network_in(context, folder) for name, folder in folders.items()}
    with Bar(f"compare {len(networks)} models", total=3) as bar:
        bar.begin("adversarial images")
        attacked = {
            name: adversarial_images(context, folder, records[name], networks[name], anew=bool(chosen)) for name, folder in folders.items()
        }
        shown = {name: attacked[name if spec.source == OWN else spec.source] for name in attacked}
        images, source = ({name: getattr(found, key) for name, found in shown.items()} for key in ("images", "record"))
        bar.begin("similarity")
        views = views_of_split(images, context.dataset.test, context.machine)
        compared = compare.compare(networks, views, min(map(len, images.values())), found, spec)
        bar.begin("figures")
        described = {"estimator": ESTIMATOR, "gram": spec.gram, "n": sum(compared.similarity.sizes), "adversarial_source": source}
        described |= context.made_by({"similarity": spec.model_dump(mode="json")})
        described |= {"images_of": context.dataset.digest, "data": {name: digest_of_data(record) for name, record in records.items()}}
        digest = write(out, compared, described | compare.describe(compared))
    if of_study:
        record = {"digests": {name: record["digest"] for name, record in records.items()}, "cka": digest}
        write_atomically(workspace.record("compare", "panels"), to_json(record, indent=1))
    tracking.log_result(context.tracking, out)
    return compared


def are_alike(context: Context, models: Sequence[str]) -> bool:
    """Whether all models were trained by advml for images and classes like the prepared ones, so that they can be attacked."""
    shape, classes = list(context.dataset.shape), list(context.dataset.classes)
    for model in models:
        if not is_folder(model):
            return False
        record = read_record(find_model(context.workspace, model))
        if list(record.get("input", ())) != shape or list(record.get("classes", ())) != classes:
            return False
    return True


def _grid_panels(context: Context, folders: dict[str, Path]) -> list[compare.Panel]:
    """Panels of the paper for all seeds, as far as models are trained; adds these to `folders`."""
    config, workspace = context.config, context.workspace
    wanted = [panel for seed in config.seeds for panel in compare.paper_panels(config.grid, seed)]
    found = [panel for panel in wanted if all((workspace.model(name) / "model.json").exists() for name in (panel.first, panel.second))]
    folders |= {name: workspace.model(name) for panel in found for name in (panel.first, panel.second)}
    return found


def _others(context: Context) -> dict[str, Path]:
    """Folders of all evaluated models of the grid; those without a panel appear on the map only."""
    config, workspace = context.config, context.workspace
    names = [model_name(*one) for one in itertools.product(config.grid.schemes, config.grid.regimes, config.seeds)]
    return {
        name: workspace.model(name)
        for name in names
        if (workspace.model(name) / "model.json").exists() and workspace.adversarial(name).exists()
    }


def _nothing(out: Path) -> None:
    """Record that there is nothing to compare, and remove the files of an earlier comparison."""
    for path in (out / "cka.npz", *out.glob("*.png")):
        path.unlink(missing_ok=True)
    write_atomically(out / "cka.json", to_json({"panels": [], "reason": NOTHING}, indent=1))


def checked(context: Context, folder: Path, *, strict: bool) -> dict[str, Any]:
    """Read model.json of a model, and check that it can be compared on the prepared data; `strict`: it must have been trained on them.

    Raises:
        UserError: it has other image shapes or classes, or was trained on other data.
    """
    record, name, data = read_record(folder), folder.name, context.dataset
    ours, theirs = tuple(data.shape), tuple(record.get("input", ()))
    if theirs != ours:
        told = [" x ".join(str(side) for side in shape) for shape in (theirs, ours)]
        raise UserError(f"{name} takes {told[0]} images, data/prepared has {told[1]}; compare models of one dataset")
    if "classes" in record and list(record["classes"]) != list(data.classes):
        raise UserError(
            f"{name} has the classes {few(record['classes'])}, data/prepared has {few(data.classes)}; compare models of one dataset"
        )
    if (there := str(digest_of_data(record))) != data.digest:
        told = f"{name} was trained on other data ({there[:16]}) than data/prepared ({data.digest[:16]})"
        if strict:
            raise UserError(f"{told}; run: dvc repro")
        tell(f"note: {told}, which may contain these test images")
    return record


def digest_of_data(record: Mapping[str, Any]) -> str | None:
    """Digest of the data that a model was trained on; None for an imported model."""
    return record.get("data", {}).get("digest")


def network_in(context: Context, folder: Path) -> Network:
    """Load a network with the classifier that attacks need.

    Raises:
        UserError: it has no classifier, or another number of classes.
    """
    network, wanted = load_classifier(folder), len(context.dataset.classes)
    if network.architecture.classes != wanted:
        raise UserError(f"{folder} gives {network.architecture.classes} logits, but data/prepared has {wanted} classes")
    return place(network, context.machine.device)


def adversarial_images(context: Context, folder: Path, record: Mapping[str, Any], network: Network, *, anew: bool) -> AdversarialImages:
    """Adversarial images of a model in `folder` with this model.json: the stored ones if they match params.yaml, else new ones.

    Args:
        anew: whether to attack if stored images are missing or do not match; False: raise, because a DVC stage must not do another's work.
    Raises:
        UserError: stored images are missing or do not match while `anew` is False, or they are damaged.
    """
    spec, test = context.config.evaluate, context.dataset.test
    run = {"seed": spec.seed, "batch_size": spec.batch_size}
    attack = threat_model_2(spec, context.config.threat_model)
    wanted = describe_kept(attack, min(spec.adversarial_images or len(test), len(test)), **run)
    home, name = home_of(folder) or (None, Path(os.path.abspath(folder)).name)
    if home and digest_of_data(record) == context.dataset.digest and home.adversarial(name).exists():
        stored = adversarial.read(home.adversarial(name), digest=record["digest"])
        differing = [key for key, value in wanted.items() if key in stored.record and stored.record[key] != value]
        if not differing:
            return stored
        if not anew:
            told = ", ".join(f"{key} {stored.record[key]} instead of {wanted[key]}" for key in differing)
            raise UserError(f"{home.adversarial(name)} was made with {told}; measure again with: dvc repro, or advml evaluate")
    elif not anew:
        raise UserError(f"{name} has no adversarial images; make them with: dvc repro, or advml evaluate")
    images = kept_images(network, test, attack, context.machine, **run, keep=spec.adversarial_images)
    return AdversarialImages(images, {"model": name, "digest": record["digest"]} | describe_kept(attack, len(images), **run))


def write(out: Path, compared: compare.Comparison, described: Mapping[str, Any]) -> str:
    """Write the files of a comparison, and remove figures of an earlier one; returns the sha256 of cka.npz."""
    for path in out.glob("*.png"):
        path.unlink()
    arrays = to_npz(compare.arrays(compared))
    write_atomically(out / "cka.npz", arrays)
    write_atomically(out / "cka.json", to_json(described, indent=1))
    for kind, measure in itertools.product(compared.kinds, compared.by_measure):
        name = kind if measure == "cka" else f"{kind}-{measure}"
        write_atomically(out / f"{name}.png", to_png(_figure(compared, kind, measure)))
    title = f"Distances between the encoders' final representations: {compare.ANGLES[compared.distance][0]}"
    if (drawn := model_map(list(compared.similarity.norms), compared.distances, title=title)) is not None:
        write_atomically(out / "map.png", to_png(drawn))
    return sha256(arrays)


def _figure(compared: compare.Comparison, kind: str, measure: str) -> Any:
    names = {model: [layer.name for layer in rows] for (model, _), rows in compared.similarity.rows.items()}
    drawn = [
        Heatmap(
            compared.matrix(panel, kind, measure=measure), panel.group, names[panel.first], names[panel.second], panel.first, panel.second
        )
        for panel in compared.panels
    ]
    label = "CKA" if measure == "cka" else measure
    return heatmaps(drawn, title=f"{label} between models, {kind} images", columns=min(3, len(drawn)), measure=label)
