"""What has been measured in a study, read from its files and checked against its models and its parameters.

A measurement of other weights than the model's, or at another epsilon than the study's, is no evidence: it counts as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from advml.config import ThreatModelSection
from advml.core.errors import UserError
from advml.core.io import read_json
from advml.core.paths import Workspace, model_name
from advml.evaluation import records, samples
from advml.evaluation.flag_summary import NONE, flag_summary, transfer_flags
from advml.similarity import compare, measures, represent, statistics
from advml.similarity.cka import Similarity
from advml.similarity.measures import Scalar
from advml.similarity.statistics import Estimate

# Numbers that claims are made of: an estimate, what it is of, and the conditions under which it was measured.
#
# Two numbers are subtracted, or averaged over seeds, only if their conditions are the same: data, images, batches, layers, attack.


class Missing(Exception):
    """A number that a claim needs cannot be had: a model is not trained or measured, or not in the same way as another. Says what to do."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A number. `conditions` by name, None where it is not known. `doubts`: what diagnostics say against it, by model."""

    name: str
    estimate: Estimate
    conditions: Mapping[str, Any]
    doubts: Mapping[str, str] = field(default_factory=dict)


def require_alike(first: Measured | Block, second: Measured | Block) -> None:
    """Raise Missing unless both were measured under the same conditions."""
    for key in first.conditions.keys() | second.conditions.keys():
        ours, theirs = first.conditions.get(key), second.conditions.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise Missing(f"{first.name} and {second.name} were measured with different {key}; measure both again with: dvc repro")


def difference(first: Measured, second: Measured) -> Measured:
    """first - second; errors that both have in common are taken off."""
    require_alike(first, second)
    found = statistics.difference(first.estimate, second.estimate)
    return Measured(f"{first.name} minus {second.name}", found, first.conditions, {**first.doubts, **second.doubts})


def over_seeds(found: Sequence[Measured]) -> Estimate:
    """Mean over seeds, see `statistics.over_seeds`."""
    for other in found[1:]:
        require_alike(found[0], other)
    return statistics.over_seeds([each.estimate for each in found])


@dataclass(frozen=True, eq=False)
class Block:
    """The layers of a model that count, against themselves or against those of another one: what scalars of CKA are made of.

    Attributes:
        first, second: names of models in `similarity`.
        rows, columns: (L1,), (L2,) bool: the layers of each that count.
    """

    name: str
    similarity: Similarity
    first: str
    second: str
    rows: np.ndarray
    columns: np.ndarray
    conditions: Mapping[str, Any]

    def scalar(self, scalar: Scalar, *, chosen: np.ndarray | None = None) -> Measured:
        """A scalar; `chosen` (bool, of the layers that count) leaves out more than the dead ones."""
        found = measures.estimate(self.similarity, scalar, self.first, self.second, rows=self.rows, columns=self.columns, chosen=chosen)
        return Measured(self.name, found, self.conditions)

    def alive(self, scalar: Scalar) -> np.ndarray:
        """Which of the layers that count are alive in the kinds of input that the scalar is of."""
        return measures.living(self.similarity, scalar.keys(self.first, self.second), self.rows, self.columns).alive


def change(after: Block, before: Block, scalar: Scalar) -> Measured:
    """What a scalar has changed by, over the layers that are alive in both."""
    require_alike(after, before)
    both = after.alive(scalar) & before.alive(scalar)
    return difference(after.scalar(scalar, chosen=both), before.scalar(scalar, chosen=both))


# What has been measured in a study, read from its files and checked against its models and its parameters.

HALF = "_half"  # metrics at half of the epsilon end in it
REMEDY = "make it again with: dvc repro"


class Study:
    """The measured files of one workspace, for one seed.

    Every method raises Missing where a model has not been measured, or not as this study asks, and UserError where a file is damaged.

    Args:
        attacked: norm and epsilon of the attacks that all models are compared at.
        epsilon: that of training, of a study beside the main one; None: of the main one.
    """

    def __init__(self, attacked: ThreatModelSection, workspace: Workspace, seed: int, *, epsilon: float | None = None) -> None:
        self.attacked, self.workspace, self.seed, self.epsilon = attacked, workspace, seed, epsilon
        self.block = cache(self._block)

    def accuracy(self, metric: str, scheme: str, regime: str) -> Measured:
        """An accuracy, and on which test images: differences between models are paired by image."""
        name = model_name(scheme, regime, self.seed)
        record = self._record("evaluate", name)
        figure = record.get("figures", {}).get(metric)
        if figure is None:
            raise Missing(name)
        self._require_attack(name, figure, share=0.5 if metric.endswith(HALF) else 1.0)
        found, images = self._by_image(name, metric, record)
        data = self._model(name).get("data", {}).get("digest")
        conditions = {"data": data, "images": figure["n"], "test images": images, "attacks": _attacks(figure)}
        said = flag_summary(record.get("diagnostics", {}), self._transferred.get(name, ()))
        return Measured(name, found, conditions, {} if said == NONE else {name: said})

    def _by_image(self, name: str, metric: str, record: dict[str, Any]) -> tuple[Estimate, str]:
        """A figure from samples.parquet, if that is the file of the record; and the digest of the test images."""
        path, figure, again = self.workspace.samples(name), record["figures"][metric], "measure again with: dvc repro"
        if not path.is_file():
            raise Missing(f"{path}, without which accuracies cannot be paired image by image; restore it with: dvc pull, or {again}")
        table, about = samples.read(path)
        try:
            right, digest, images = samples.right(table, metric), about["digest"], about["test_digest"]
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); {again}") from None
        if (digest, images) != (record["digest"], record.get("test_digest")):
            raise Missing(f"{path} is of other weights or test images than the record of {name}; {again}")
        if (len(right), int(right.sum())) != (figure["n"], figure["correct"]):
            counts = f"{int(right.sum())} of {len(right)} images right under {metric}, its record {figure['correct']} of {figure['n']}"
            raise Missing(f"{path} has {counts}; {again}")
        return statistics.share(right), images

    def _block(self, scheme: str, regime: str) -> Block:
        """A model's layers against themselves."""
        name = model_name(scheme, regime, self.seed)
        record = self._record("represent", name)
        try:
            how, data = record["how"], record["data"]
            conditions = _conditions(how, data=data, layers=how["counted_in_scalars"], attacks=[how["adversarial_source"]])
        except KeyError as error:
            raise Missing(f"{name} was measured by an older version ({error} is not recorded); measure again with: dvc repro") from None
        self._require_attack(name, how["adversarial_source"])
        similarity, counted = represent.read(self.workspace.report(name) / "cka.npz", digest=record["cka"])
        own = represent.MODEL
        return Block(name, similarity, own, own, counted, counted, conditions)

    def cross(self, regime: str, first: str, second: str) -> Block:
        """The layers of one scheme's model against those of another's, each on its own adversarial images."""
        names = [model_name(scheme, regime, self.seed) for scheme in (first, second)]
        pair = f"{names[0]} with {names[1]}"
        found = self._comparison
        if found is None or not any([panel.first, panel.second] == names for panel in found.compared.panels):
            raise Missing(f"{pair}; measure with: advml compare")
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
        rows, columns = (found.compared.counted[name] for name in names)
        return Block(pair, found.compared.similarity, *names, rows, columns, conditions)

    @cached_property
    def _transferred(self) -> dict[str, list[dict[str, str]]]:
        return transfer_flags(records.read_transfer(self.workspace))

    @cached_property
    def _comparison(self) -> compare.Stored | None:
        return compare.stored(self.workspace)

    def _record(self, stage: str, name: str) -> dict[str, Any]:
        """The record of a measurement of the present weights."""
        record = records.read(self.workspace, stage, name)
        if record is None:
            raise Missing(name)
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
        """An attack at the norm and `share` of the epsilon that params.yaml asks for, which all models are compared at."""
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
        """model.json; nothing where records alone are here, as after a partial `dvc pull`."""
        path = self.workspace.model(name) / "model.json"
        return read_json(path, remedy=REMEDY) if path.exists() else {}


def _attacks(figure: dict[str, Any]) -> list[dict[str, Any]]:
    """How a figure was attacked. Of a cascade its steps too, but for threat model I, which the schemes without a projection head lack."""
    steps = [step for step in figure.get("cascade", ()) if step.get("objective") != "contrastive"]
    return [represent.settings(attack) for attack in (figure, *steps)]


def _conditions(how: dict[str, Any], *, data: Any, layers: list[str], attacks: list[dict[str, Any]]) -> dict[str, Any]:
    """What must be the same before two similarities are compared."""
    return {
        "data": data,
        "estimators": [how["estimator"], how["gram"]],
        "images": how["n"],
        "batches": how["batch_sizes"],
        "layers": layers,
        "attacks": [represent.settings(attack) for attack in attacks],
    }
