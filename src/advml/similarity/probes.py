"""Linear probes: accuracy of a linear classifier on each layer's features, for clean and adversarial images.

All layers' features come from one pass per split: pooled over space, standardised with mean and deviation of the training images.
Each probe is multinomial logistic regression with an L2 penalty, fitted on `train` for every strength in a grid; the best one on
`validation` is evaluated on `test`.

The solver is scikit-learn's L-BFGS. Its convergence is checked: the gradient of the objective is recomputed in float64, and its
largest entry is recorded with every probe (converged if at most TOLERANCE).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from advml.similarity.layers import Layer, watching

TOLERANCE = 1e-4  # for the largest entry of the gradient of the objective (mean cross-entropy + penalty)
MOST_STEPS = 2000


def pooling(shape: Sequence[int]) -> str:
    """Axes that are averaged, for a layer's shape per image: `none` (C,), `space` (C, H, W), `space last` (H, W, C), `tokens` (T, C)."""
    if len(shape) == 1:
        return "none"
    if len(shape) == 2:
        return "tokens"
    return "space last" if len(shape) == 3 and shape[0] == shape[1] != shape[2] else "space"


def pooled(output: Tensor) -> Tensor:
    """Pooled features (N, C) of a layer's output, float32."""
    output = output.float()
    match pooling(output.shape[1:]):
        case "none":
            return output.clone()  # the network may change it in place later
        case "tokens":
            return output.mean(1)
        case "space last":
            return output.mean((1, 2))
        case _:
            return output.flatten(2).mean(2)


def pooled_features(network: nn.Module, rows: Sequence[Layer], batches: Iterable[Tensor]) -> list[np.ndarray]:
    """Pooled features (N, C) of every layer, from one pass over image batches (n, C, H, W)."""
    parts: list[list[Tensor]] = [[] for _ in rows]
    with watching(network, rows, lambda number, output: parts[number].append(pooled(output).cpu())) as run:
        for images in batches:
            run(images)
    return [torch.cat(part).numpy() for part in parts]


@dataclass(frozen=True, repr=False)
class Probe:
    """Accuracies of a fitted probe, and its fit. `strength` is the inverse of the penalty (scikit-learn's C)."""

    accuracy: dict[str, float]  # keys: validation, clean, adversarial
    correct: dict[str, int]
    strength: float
    steps: int
    gradient: float

    @property
    def converged(self) -> bool:
        return self.gradient <= TOLERANCE

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in self.accuracy.items())
        return f"Probe({figures}, strength {self.strength:g}{'' if self.converged else ', not converged'})"


def fit(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    tests: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    strengths: Sequence[float],
) -> Probe:
    """Fit the probe of one layer; `train`, `validation` and each test are pairs (features (N, C), labels (N,)).

    Of several strengths with the best accuracy on validation, the smallest (the strongest penalty) is taken.
    """
    mean, deviation = train[0].mean(0, dtype=np.float64), train[0].std(0, dtype=np.float64)
    deviation[deviation <= 1e-6 * np.abs(mean) + 1e-12] = 1  # a constant feature: do not amplify its rounding errors

    def standard(features: np.ndarray) -> np.ndarray:
        return (features - mean) / deviation

    features, labels = standard(train[0]), train[1]
    model = LogisticRegression(tol=TOLERANCE / 2, max_iter=MOST_STEPS, warm_start=True)
    best: tuple[float, np.ndarray, np.ndarray, float, int] | None = None
    for strength in sorted(strengths):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # convergence is judged by `gradient`
            model.set_params(C=strength).fit(features, labels)
        score = float((model.predict(standard(validation[0])) == validation[1]).mean())
        if best is None or score > best[0]:
            best = (score, model.coef_.copy(), model.intercept_.copy(), strength, int(model.n_iter_[0]))
    score, weights, bias, strength, steps = best
    model.coef_, model.intercept_ = weights, bias
    right = {name: int((model.predict(standard(x)) == y).sum()) for name, (x, y) in {"validation": validation, **tests}.items()}
    counts = {name: len(y) for name, (_, y) in {"validation": validation, **tests}.items()}
    return Probe(
        accuracy={name: right[name] / counts[name] for name in right},
        correct=right,
        strength=strength,
        steps=steps,
        gradient=_gradient(features, labels, model.classes_, weights, bias, strength),
    )


def _gradient(
    features: np.ndarray, labels: np.ndarray, classes: np.ndarray, weights: np.ndarray, bias: np.ndarray, strength: float
) -> float:
    """Largest entry of the gradient of mean cross-entropy + |weights|^2 / (2 C N)."""
    logits = features @ weights.T + bias
    if len(classes) == 2:  # one row of weights stands for the second class
        share = 1 / (1 + np.exp(-logits))
        error = share - (labels == classes[1])[:, None]
    else:
        share = np.exp(logits - logits.max(1, keepdims=True))
        error = share / share.sum(1, keepdims=True) - (labels[:, None] == classes)
    n = len(features)
    slope = error.T @ features / n + weights / (strength * n)
    return float(max(np.abs(slope).max(), np.abs(error.mean(0)).max()))
