"""What has been measured, as numbers that claims are made of: estimates with bootstrap draws.

Draws of CKA scalars resample the batches, the same for all models of a study, so differences are paired. Draws of
accuracies resample images, independently for each model: the intervals of their differences are on the wide side.
"""

from __future__ import annotations

import json
from functools import cache, cached_property

import numpy as np

from advml import config
from advml.errors import UserError
from advml.evaluation import records
from advml.paths import Workspace, model_name
from advml.similarity import comparison, files, representation, summary
from advml.similarity.cka import Similarity
from advml.similarity.summary import Estimate


class Missing(Exception):
    """A model that a claim needs has not been trained or measured."""


def difference(first: Estimate, second: Estimate) -> Estimate:
    """first - second, draw by draw."""
    paired = len(first.draws) == len(second.draws)
    return Estimate(first.value - second.value, first.draws - second.draws if paired else np.empty(0))


def over_seeds(estimates: list[Estimate], *, seed: int) -> Estimate:
    """Mean over seeds. A draw takes as many seeds as there are, with replacement, and of each the same draw of batches."""
    if len(estimates) == 1:
        return estimates[0]
    value = float(np.mean([estimate.value for estimate in estimates]))
    if len({len(estimate.draws) for estimate in estimates}) != 1:
        return Estimate(value, np.empty(0))
    draws = np.stack([estimate.draws for estimate in estimates])  # (seeds, S)
    chosen = np.random.default_rng(seed).integers(len(draws), size=draws.shape)
    return Estimate(value, np.take_along_axis(draws, chosen, axis=0).mean(0))


class Study:
    """The measured files of one workspace, for one seed.

    Every method raises Missing where a model has not been measured, and UserError where a file is damaged.
    """

    def __init__(self, spec: config.Similarity, workspace: Workspace, seed: int, *, is_main: bool = True) -> None:
        self.spec, self.workspace, self.seed, self.is_main = spec, workspace, seed, is_main
        self._similarity = cache(self._read)

    def scalar(self, name: str, scheme: str, regime: str) -> Estimate:
        """A scalar of SCALARS of one model."""
        similarity, counted = self._similarity(model_name(scheme, regime, self.seed))
        own = representation.MODEL
        return summary.estimate(similarity, summary.SCALARS[name], own, own, self._weights(similarity), rows=counted, columns=counted)

    def accuracy(self, metric: str, scheme: str, regime: str) -> Estimate:
        """An accuracy of one model. Draws are of Jeffreys' estimate (x + 1/2) / (n + 1), so that 0 % and 100 % vary too."""
        name = model_name(scheme, regime, self.seed)
        figure = (records.read(self.workspace, "evaluate", name) or {}).get("figures", {}).get(metric)
        if figure is None:
            raise Missing(name)
        n, correct = figure["n"], figure["correct"]
        random = np.random.default_rng([self.spec.seed, *name.encode()])
        return Estimate(correct / n, random.binomial(n, (correct + 0.5) / (n + 1), size=self.spec.draws) / n)

    def cross(self, regime: str, first: str, second: str) -> Estimate:
        """Mean off-diagonal CKA between two schemes' models, each on its own adversarial images."""
        names = [model_name(scheme, regime, self.seed) for scheme in (first, second)]
        compared = self._comparison
        if compared is None or not any([panel.first, panel.second] == names for panel in compared.panels):
            raise Missing(f"{names[0]} against {names[1]}")
        rows, columns = (compared.counted[name] for name in names)
        scalar = summary.Scalar(summary.mean_off_diagonal, **summary.ADVERSARIAL)
        weights = self._weights(compared.similarity)
        return summary.estimate(compared.similarity, scalar, *names, weights, rows=rows, columns=columns)

    def _weights(self, similarity: Similarity) -> np.ndarray:
        return summary.draws(len(similarity.sizes), number=self.spec.draws, seed=self.spec.seed)

    def _read(self, name: str) -> tuple[Similarity, np.ndarray]:
        if records.read(self.workspace, "represent", name) is None:
            raise Missing(name)
        return files.read(self.workspace.report(name) / "cka.npz")

    @cached_property
    def _comparison(self) -> comparison.Comparison | None:
        folder = self.workspace.reports / "compare"
        if not self.workspace.record("compare", "panels").exists():
            return None
        try:
            described = json.loads((folder / "cka.json").read_text(encoding="utf-8"))
            return comparison.read(folder / "cka.npz", described) if described["panels"] else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} is damaged ({error}); measure again with: advml compare") from None
