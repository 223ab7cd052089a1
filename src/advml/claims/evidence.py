"""Measurements of a study, read from its files and checked against its models and its parameters.

A measurement that was made with other weights than the model has now, or at another epsilon than the study's, counts as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from advml.config import ThreatModelSection
from advml.core.io import read_json, reporting_damage
from advml.core.paths import Workspace, model_name
from advml.evaluation import records, samples
from advml.evaluation.records import AT_CHANCE, NONE, flag_summary, is_at_chance, transfer_flags
from advml.similarity import compare, measures, represent, statistics
from advml.similarity.alternatives import Tables
from advml.similarity.cka import Similarity
from advml.similarity.measures import Scalar
from advml.similarity.statistics import Estimate

# The numbers that claims use: an estimate with its name and the conditions of its measurement (data, images, batches, layers, attack).
# Two numbers are subtracted, or averaged over seeds, only if their conditions are the same.


class Missing(Exception):
    """A number that a claim needs is missing, because a model was not trained or measured, or not like another; names the remedy."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A measured number.

    Attributes:
        name: of the model, or models, that it describes.
        conditions: name -> value; None where it is not known.
        doubts: model -> summary of its flags of gradient masking.
    """

    name: str
    estimate: Estimate
    conditions: Mapping[str, Any]
    doubts: Mapping[str, str] = field(default_factory=dict)


def require_alike(first: Measured | Block, second: Measured | Block) -> None:
    """Raise Missing unless both numbers were measured under the same conditions."""
    for key in first.conditions.keys() | second.conditions.keys():
        ours, theirs = first.conditions.get(key), second.conditions.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise Missing(f"{first.name} and {second.name} were measured with different {key}; measure both again with: dvc repro")


def difference(first: Measured, second: Measured) -> Measured:
    """Difference first - second, whose interval uses that errors common to both cancel."""
    require_alike(first, second)
    found = statistics.difference(first.estimate, second.estimate)
    return Measured(f"{first.name} minus {second.name}", found, first.conditions, {**first.doubts, **second.doubts})


def over_seeds(found: Sequence[Measured]) -> Estimate:
    """Mean over seeds, see `statistics.over_seeds`."""
    for other in found[1:]:
        require_alike(found[0], other)
    return statistics.over_seeds([each.estimate for each in found])


def accuracy_difference(studies: Sequence[Study], metric: str, first: tuple[str, str], second: tuple[str, str]) -> Estimate | None:
    """Mean over seeds of the difference of two accuracies, first - second, paired by image; None if they cannot be compared.

    Args:
        studies: the same study, for each seed.
        first, second: scheme and regime of the models.
    """
    try:
        return over_seeds([difference(study.accuracy(metric, *first), study.accuracy(metric, *second)) for study in studies])
    except Missing:
        return None


@dataclass(frozen=True, eq=False)
class Block:
    """Similarities between the counted layers of a model and its own, or those of a second model, from which scalars are computed.

    Attributes:
        first, second: names of the models in `similarity`.
        rows, columns: (L1,), (L2,) bool: the layers of each that are counted in scalars.
    """

    name: str
    similarity: Similarity | Tables
    first: str
    second: str
    rows: np.ndarray
    columns: np.ndarray
    conditions: Mapping[str, Any]

    def scalar(self, scalar: Scalar, *, chosen: np.ndarray | None = None) -> Measured:
        """Estimate of a scalar over the living layers; `chosen` (bool, one per counted layer) restricts them further."""
        found = measures.estimate(self.similarity, scalar, self.first, self.second, rows=self.rows, columns=self.columns, chosen=chosen)
        return Measured(self.name, found, self.conditions)

    def alive(self, scalar: Scalar) -> np.ndarray:
        """Mask (bool, one per counted layer) of the layers that are alive on the kinds of input that the scalar uses."""
        return measures.living(self.similarity, scalar.keys(self.first, self.second), self.rows, self.columns).alive


def change(after: Block, before: Block, scalar: Scalar) -> Measured:
    """Change of a scalar, after - before, over the layers that are alive in both."""
    require_alike(after, before)
    both = after.alive(scalar) & before.alive(scalar)
    return difference(after.scalar(scalar, chosen=both), before.scalar(scalar, chosen=both))


HALF = "_half"  # suffix of metrics at half of epsilon
REMEDY = "make it again with: dvc repro"


class Study:
    """Measurements of one workspace for one seed.

    Every method raises Missing if a model was not measured, or not as the study's settings ask, and UserError if a file is damaged.

    Args:
        attacked: norm and epsilon of the attacks with which all models are evaluated.
        epsilon: the epsilon of training, for a study of `pipelines/epsilon`; None: not checked.
    """

    def __init__(self, attacked: ThreatModelSection, workspace: Workspace, seed: int, *, epsilon: float | None = None) -> None:
        self.attacked, self.workspace, self.seed, self.epsilon = attacked, workspace, seed, epsilon
        self.measure = "cka"
        self.block = cache(self._block)

    def under(self, measure: str) -> Study:
        """Copy of this study whose layers are compared by another measure of similarity."""
        other = copy(self)
        other.measure, other.block = measure, cache(other._block)
        return other

    def accuracy(self, metric: str, scheme: str, regime: str) -> Measured:
        """Accuracy of a model, with the digest of its test images, by which differences between models are paired."""
        name = model_name(scheme, regime, self.seed)
        record = self._record("evaluate", name)
        figure = record.get("figures", {}).get(metric)
        if figure is None:
            raise Missing(f"{name} has no {metric}")
        if is_at_chance(record):
            raise Missing(f"{name} is no better than chance (flag {AT_CHANCE}), so its accuracies say nothing about robustness")
        self._require_attack(name, figure, share=0.5 if metric.endswith(HALF) else 1.0)
        found, images = self._by_image(name, metric, record)
        data = self._model(name).get("data", {}).get("digest")
        conditions = {"data": data, "images": figure["n"], "test images": images, "attacks": _attacks(figure)}
        said = flag_summary(record.get("diagnostics", {}), self._transferred.get(name, ()))
        return Measured(name, found, conditions, {} if said == NONE else {name: said})

    def _by_image(self, name: str, metric: str, record: dict[str, Any]) -> tuple[Estimate, str]:
        """Estimate of an accuracy from samples.parquet, which must agree with the record, and the digest of the test images."""
        path, figure, again = self.workspace.samples(name), record["figures"][metric], "measure again with: dvc repro"
        if not path.is_file():
            raise Missing(
                f"{path} is missing, without which accuracies cannot be paired image by image; restore it with: dvc pull, or {again}"
            )
        table, about = samples.read(path)
        with reporting_damage(path, remedy=again):
            right, digest, images = samples.right(table, metric), about["digest"], about["test_digest"]
        if (digest, images) != (record["digest"], record.get("test_digest")):
            raise Missing(f"{path} is of other weights or test images than the record of {name}; {again}")
        if (len(right), int(right.sum())) != (figure["n"], figure["correct"]):
            counts = f"{int(right.sum())} of {len(right)} images right under {metric}, its record {figure['correct']} of {figure['n']}"
            raise Missing(f"{path} has {counts}; {again}")
        return statistics.share(right), images

    def _block(self, scheme: str, regime: str) -> Block:
        """Similarities between the layers of one model."""
        name = model_name(scheme, regime, self.seed)
        record = self._record("represent", name)
        try:
            how, data = record["how"], record["data"]
            conditions = _conditions(how, data=data, layers=how["counted_in_scalars"], attacks=[how["adversarial_source"]])
            conditions |= self._measured(name, how)
        except KeyError as error:
            raise Missing(f"{name} was measured by an older version ({error} is not recorded); measure again with: dvc repro") from None
        self._require_attack(name, how["adversarial_source"])
        similarity, counted = represent.read(self.workspace.report(name) / "cka.npz", digest=record["cka"], measure=self.measure)
        own = represent.MODEL
        return Block(name, similarity, own, own, counted, counted, conditions)

    def cross(self, regime: str, first: str, second: str) -> Block:
        """Similarities between the layers of two schemes' models, each on adversarial images crafted on itself."""
        names = [model_name(scheme, regime, self.seed) for scheme in (first, second)]
        pair = f"{names[0]} with {names[1]}"
        found = self._comparison
        if found is None or not any([panel.first, panel.second] == names for panel in found.compared.panels):
            if absent := next((name for name in names if not self._model(name)), None):
                raise Missing(f"{absent} is missing")
            raise Missing(f"{pair} is not compared; measure with: advml compare")
        layers, sources = [], []
        for name in names:
            self._require_weights(name, found.digests.get(name))
            source = found.described["adversarial_source"][name]
            if source["model"] != name:
                raise Missing(
                    f"{name} was shown the adversarial images of {source['model']} (similarity.source); the claim needs each model's own: "
                    "set similarity.source: own, then dvc repro"
                )
            self._require_attack(name, source)
            sources.append(source)
            layers.append(found.counted_layers(name))
        if layers[0] != layers[1]:
            raise Missing(f"{pair}: the layers that count differ; the claim needs one architecture and one similarity.layers")
        data = sorted({found.described["data"][name] for name in names})
        conditions = _conditions(found.described, data=data, layers=layers[0], attacks=sources)
        conditions |= self._measured(pair, found.described)
        rows, columns = (found.compared.counted[name] for name in names)
        return Block(pair, found.compared.by_measure[self.measure], *names, rows, columns, conditions)

    def _measured(self, name: str, how: Mapping[str, Any]) -> dict[str, Any]:
        """Conditions of measures other than CKA: the measure and its number of images."""
        if self.measure == "cka":
            return {}
        about = how.get("measures", {})
        if self.measure not in about.get("intervals", ()):
            raise Missing(f"{name} was not measured by {self.measure}; measure with: dvc repro")
        return {"measures": self.measure, "images": about["images"], "batches": None}

    @cached_property
    def _transferred(self) -> dict[str, list[dict[str, str]]]:
        return transfer_flags(records.read_transfer(self.workspace))

    @cached_property
    def _comparison(self) -> compare.Stored | None:
        return compare.stored(self.workspace)

    def _record(self, stage: str, name: str) -> dict[str, Any]:
        """Record of a measurement; raises Missing if it was made with other weights than the model has now."""
        record = records.read(self.workspace, stage, name)
        if record is None:
            raise Missing(f"{name} is missing")
        self._require_weights(name, record.get("digest"))
        return record

    def _require_weights(self, name: str, measured: str | None) -> None:
        model = self._model(name)
        if model and model.get("digest") != measured:
            raise Missing(f"{name} has been trained anew since it was measured; measure again with: dvc repro")
        trained = model.get("parameters", {}).get("threat_model", {}).get("epsilon")
        if self.epsilon is not None and trained is not None and not math.isclose(trained, self.epsilon):
            raise Missing(
                f"{name} in {self.workspace.root} was trained at epsilon {trained:g}, others there at {self.epsilon:g}; train it again"
            )

    def _require_attack(self, name: str, attack: dict[str, Any], *, share: float = 1.0) -> None:
        """Raise Missing unless the attack used the norm of params.yaml and `share` times its epsilon."""
        if "epsilon" not in attack:
            return
        norm, epsilon = self.attacked.norm, share * self.attacked.epsilon
        if attack["norm"] != norm or not math.isclose(attack["epsilon"], epsilon):
            where = "" if self.epsilon is None else f" in {self.workspace.root}"
            raise Missing(
                f"{name}{where} was attacked at {attack['norm']} {attack['epsilon']:g}, params.yaml asks for {norm} {epsilon:g}; "
                "evaluate and measure it again with: dvc repro"
            )

    def _model(self, name: str) -> dict[str, Any]:
        """Content of model.json; empty if the model is not on disk, as after a partial `dvc pull`."""
        path = self.workspace.model(name) / "model.json"
        return read_json(path, remedy=REMEDY) if path.exists() else {}


def _attacks(figure: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings of a figure's attack and of its cascade's steps, without threat model I, which schemes without projection head lack."""
    steps = [step for step in figure.get("cascade", ()) if not step["name"].startswith("threat_model_1")]
    return [represent.settings(attack) for attack in (figure, *steps)]


def _conditions(how: dict[str, Any], *, data: Any, layers: list[str], attacks: list[dict[str, Any]]) -> dict[str, Any]:
    """Conditions that two similarities must share before they are compared."""
    return {
        "data": data,
        "estimators": [how["estimator"], how["gram"]],
        "images": how["n"],
        "batches": how["batch_sizes"],
        "layers": layers,
        "attacks": [represent.settings(attack) for attack in attacks],
    }
