"""Probes against autograd, a solver of another kind, and a look at which split each step uses."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from advml.similarity import probes
from advml.similarity.layers import layers


def sample(count: int, *, classes: int = 3, size: int = 5, seed: int = 0, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clusters, with features of very different scales and offsets."""
    centres = np.random.default_rng(99).normal(size=(classes, size))
    generator, labels = np.random.default_rng(seed), np.arange(count) % classes
    features = centres[labels] + noise * generator.normal(size=(count, size))
    return (features * np.logspace(-2, 2, size) + np.linspace(-50, 50, size)).astype(np.float32), labels


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What each fit has found: (standardised features, labels, classes, weights, bias, strength)."""
    seen, gradient = [], probes._gradient
    monkeypatch.setattr(probes, "_gradient", lambda *arguments: seen.append(arguments) or gradient(*arguments))
    return seen


def loss(weights: Tensor, bias: Tensor, features: Tensor, labels: Tensor, strength: float) -> Tensor:
    """Mean cross-entropy + |weights|^2 / (2 C N); one row of weights tells two classes apart."""
    logits = features @ weights.T + bias
    two = len(weights) == 1
    data = F.binary_cross_entropy_with_logits(logits[:, 0], labels.double()) if two else F.cross_entropy(logits, labels)
    return data + weights.square().sum() / (2 * strength * len(features))


def solution(features: np.ndarray, labels: np.ndarray, strength: float, rows: int) -> np.ndarray:
    """The minimum by SciPy's BFGS in double precision, weights and then biases."""
    x, y, size = torch.from_numpy(features), torch.from_numpy(labels), features.shape[1]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.from_numpy(flat).requires_grad_()
        value = loss(at[: rows * size].view(rows, size), at[rows * size :], x, y, strength)
        (gradient,) = torch.autograd.grad(value, at)
        return value.item(), gradient.numpy()

    options = {"gtol": 1e-9, "maxiter": 5000}
    return scipy.optimize.minimize(objective, np.zeros(rows * (size + 1)), jac=True, method="BFGS", options=options).x


# The fit


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_recorded_gradient_equals_autograds(classes):
    generator = np.random.default_rng(1)
    features, labels, rows = generator.normal(size=(30, 4)), np.arange(30) % classes, 1 if classes == 2 else classes
    weights, bias = generator.normal(size=(rows, 4)), generator.normal(size=rows)
    w, b = (torch.from_numpy(each).requires_grad_() for each in (weights, bias))
    gradients = torch.autograd.grad(loss(w, b, torch.from_numpy(features), torch.from_numpy(labels), 0.3), (w, b))
    for scale in (1, 1e-9):  # under the second the largest entry may be the bias's
        expected = max(float(gradient.abs().max()) for gradient in gradients)
        found = probes._gradient(features, labels, np.arange(classes), weights, bias, 0.3)
        assert found == pytest.approx(expected, rel=1e-9) and found > 1e-3 * scale
    only_bias = probes._gradient(features * 0, labels, np.arange(classes), weights * 0, bias, 0.3)
    w, b = (torch.from_numpy(each).requires_grad_() for each in (weights * 0, bias))
    (slope,) = torch.autograd.grad(loss(w, b, torch.from_numpy(features * 0), torch.from_numpy(labels), 0.3), b)
    assert only_bias == pytest.approx(float(slope.abs().max()), rel=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_a_probe_is_where_another_solver_ends(fitted, classes, strength):
    train = sample(120, classes=classes)
    probe = probes.fit(train, sample(40, classes=classes, seed=1), {}, strengths=[strength])
    ((features, labels, found_classes, weights, bias, used),) = fitted
    assert probe.converged and probe.gradient <= probes.TOLERANCE and used == strength == probe.strength
    assert list(found_classes) == list(range(classes)) and len(weights) == (1 if classes == 2 else classes)
    flat = solution(features, labels, strength, len(weights))
    expected = features @ flat[: weights.size].reshape(weights.shape).T + flat[weights.size :]
    ours = features @ weights.T + bias
    shares = [scipy.special.softmax(logits, axis=1) if classes > 2 else scipy.special.expit(logits) for logits in (ours, expected)]
    np.testing.assert_allclose(*shares, atol=1e-4 if strength < 0.1 else 1e-3)
    ends = [(weights, bias), (flat[: weights.size].reshape(weights.shape), flat[weights.size :])]
    values = [float(loss(*map(torch.from_numpy, (*end, features, labels)), strength)) for end in ends]
    assert values[0] == pytest.approx(values[1], abs=1e-7)


def test_a_probe_that_ran_out_of_steps_says_so(monkeypatch):
    monkeypatch.setattr(probes, "MOST_STEPS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe = probes.fit(sample(90), sample(30, seed=1), {}, strengths=[10.0])
    assert not probe.converged and probe.gradient > probes.TOLERANCE and probe.steps == 1


def test_accuracies_are_the_shares_of_right_answers(fitted):
    train, validation, test = sample(120), sample(33, seed=1), sample(50, seed=2)
    probe = probes.fit(train, validation, {"clean": test, "adversarial": (-test[0], test[1])}, strengths=[0.1])
    mean, deviation = train[0].mean(0, dtype=np.float64), train[0].std(0, dtype=np.float64)
    _, _, _, weights, bias, _ = fitted[0]
    for name, (x, y) in {"validation": validation, "clean": test, "adversarial": (-test[0], test[1])}.items():
        right = int((((x - mean) / deviation @ weights.T + bias).argmax(1) == y).sum())
        assert probe.correct[name] == right and probe.accuracy[name] == right / len(y)
    assert probe.accuracy["clean"] > 0.5 > probe.accuracy["adversarial"]


def test_labels_need_not_be_counted_from_zero():
    train, test = sample(120, classes=2), sample(60, classes=2, seed=1)
    plain = probes.fit(train, test, {}, strengths=[0.1])
    assert probes.fit((train[0], 3 + 4 * train[1]), (test[0], 3 + 4 * test[1]), {}, strengths=[0.1]) == plain
    assert plain.accuracy["validation"] > 0.6 and plain.converged


# Which split does what


def test_the_strength_is_chosen_on_validation_alone():
    """Validation labels follow few features, so that the strengths differ; the tests would choose another."""
    train, validation, strengths = sample(30, size=20, noise=3), sample(150, size=20, seed=1, noise=3), (1e-3, 1e-1, 10.0)
    single = {strength: probes.fit(train, validation, {}, strengths=[strength]).correct["validation"] for strength in strengths}
    best = max(single.values())
    assert len(set(single.values())) == 3
    expected = min(strength for strength, correct in single.items() if correct == best)
    opposite = {"clean": (validation[0], (validation[1] + 1) % 3)}
    for tests in ({}, opposite):
        for order in (strengths, strengths[::-1]):
            probe = probes.fit(train, validation, tests, strengths=order)
            assert probe.strength == expected and probe.correct["validation"] == best


def test_among_equally_good_strengths_the_smallest_is_taken():
    train, validation = sample(60, noise=0.01), sample(30, seed=1, noise=0.01)
    probe = probes.fit(train, validation, {}, strengths=[10.0, 0.1, 1.0])
    assert probe.accuracy["validation"] == 1 and probe.strength == 0.1


def test_features_are_standardised_with_statistics_of_the_training_images_alone(fitted):
    train, validation, test = sample(90), sample(30, seed=1), sample(30, seed=2)
    singles = {str(i): (test[0][i : i + 1], test[1][i : i + 1]) for i in range(30)}
    probe = probes.fit(train, validation, {"all": test, **singles}, strengths=[1.0])
    assert sum(probe.correct[str(i)] for i in range(30)) == probe.correct["all"] < 30
    probes.fit(train, (validation[0] * 100, validation[1]), {"all": (test[0] + 1e3, test[1])}, strengths=[1.0])
    for first, second in zip(*(arguments[:5] for arguments in fitted), strict=True):
        np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(fitted[0][0].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(fitted[0][0].std(0), 1, atol=1e-9)


def test_a_feature_that_does_not_vary_says_nothing(fitted):
    """Rounding of a constant must not be blown up to unit variance, nor divided by zero."""
    (features, labels), generator = sample(90), np.random.default_rng(0)
    constant = np.full((90, 1), 3.7, dtype=np.float32)
    rounding = np.nextafter(np.float32(0.1), np.float32([0, 1]))[generator.integers(0, 2, size=(90, 1))]
    more = np.concatenate([features, constant, 0 * constant, rounding], axis=1)
    probe = probes.fit((more, labels), (more, labels), {}, strengths=[1.0])
    assert np.abs(fitted[0][0][:, -3:]).max() < 1e-4 and np.isfinite(fitted[0][3]).all() and probe.converged


# Pooling

SHAPES = {"none": (6,), "tokens": (9, 6), "space": (6, 4, 4), "space last": (4, 4, 6)}


@pytest.mark.parametrize(("kind", "shape"), SHAPES.items(), ids=SHAPES)
def test_features_are_pooled_to_one_vector_per_image(kind, shape):
    output = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    places = tuple(place for place, size in enumerate(output.shape) if place and size != 6)
    assert probes.pooling(shape) == kind
    torch.testing.assert_close(probes.pooled(output), output.mean(places) if places else output)
    assert probes.pooled(output.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(64, 1, 1), (8, 8, 8), (3, 5, 7)])
def test_channels_come_first_unless_the_shape_says_otherwise(shape):
    assert probes.pooling(shape) == "space" and probes.pooled(torch.rand(2, *shape)).shape == (2, shape[0])


def test_pooled_features_of_all_rows_come_from_one_pass_and_survive_what_the_network_does_in_place():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(180, 4), nn.ReLU(inplace=True))
    batches, calls = list(torch.randn(7, 1, 8, 8).split(3)), []
    rows = layers(network, batches[0], select=["0", "1", "3", "4"])
    handle = network[0].register_forward_hook(lambda *_: calls.append(1))
    found = probes.pooled_features(network, rows, batches)
    handle.remove()
    assert len(calls) == 3
    with torch.no_grad():
        maps = network[0](torch.cat(batches))
        vectors = network[3](maps.relu().flatten(1))
    for features, expected in zip(found, [maps.mean((2, 3)), maps.relu().mean((2, 3)), vectors, vectors.relu()], strict=True):
        np.testing.assert_allclose(features, expected.numpy(), atol=1e-6)
    assert (found[2] < 0).any()
