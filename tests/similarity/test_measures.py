"""Scalars against closed forms and the paper's published numbers, and intervals against simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from advml.similarity import measures
from advml.similarity.cka import Similarity
from advml.similarity.layers import Layer
from advml.similarity.measures import SCALARS, Scalar, estimate

# Clean against adversarial CKA of the 16 blocks, as published by the authors of arXiv 2302.02502, and its means.
PUBLISHED = {
    "SL ST": (
        [0.9973, 0.9798, 0.9446, 0.8868, 0.8573, 0.8521, 0.8491, 0.7973, 0.8084, 0.7903, 0.7916, 0.8067, 0.8418, 0.5633, 0.5299, 0.31],
        (0.7879, 0.5613),
    ),
    "CL AT": (
        [0.9974, 0.996, 0.9931, 0.9881, 0.9644, 0.9521, 0.9465, 0.9762, 0.9822, 0.9851, 0.9865, 0.9893, 0.9866, 0.9847, 0.9853, 0.9877],
        (0.9813, 0.9861),
    ),
    "SCL ST": (
        [0.9918, 0.9618, 0.9113, 0.7824, 0.7348, 0.7242, 0.6786, 0.6507, 0.6494, 0.6418, 0.6369, 0.6174, 0.5954, 0.4114, 0.2661, 0.0625],
        (0.6448, 0.3339),
    ),
}


def similarity_of(clean: np.ndarray, *, batches: int = 1) -> Similarity:
    """A similarity whose CKA is this matrix, in every batch and for both kinds of input."""
    key, other = ("net", "clean"), ("net", "adversarial")
    products = np.repeat(clean[None], batches, axis=0)
    norms = np.repeat(clean.diagonal()[None], batches, axis=0)
    rows = tuple(Layer(f"layer{number}", "Linear", (1,)) for number in range(len(clean)))
    pairs = [(key, key), (key, other), (other, other)]
    return Similarity({key: rows, other: rows}, dict.fromkeys(pairs, products), {key: norms, other: norms}, (8,) * batches)


# Scalars


@pytest.mark.parametrize("size", [2, 5, 16])
def test_closed_forms_of_unrelated_layers_and_of_copies(size):
    unrelated, copies = np.eye(size), np.ones((size, size))
    assert measures.mean_off_diagonal(unrelated) == 0 and measures.mean_off_diagonal(copies) == 1
    assert measures.effective_layers(unrelated) == pytest.approx(size) and measures.effective_layers(copies) == pytest.approx(1)
    assert measures.diagonal_mean(unrelated) == measures.diagonal_last_quarter(unrelated) == measures.diagonal_first_quarter(unrelated) == 1
    if size > 2:  # of two layers none is more than one apart
        assert measures.long_range(unrelated) == 0 and measures.long_range(copies) == 1


def test_two_groups_of_copies_are_as_many_layers_as_their_sizes_say():
    cka = np.kron(np.eye(2), np.ones((4, 4)))
    assert measures.effective_layers(cka) == pytest.approx(2)
    assert measures.mean_off_diagonal(cka) == pytest.approx(24 / 56)
    sizes = np.array([3, 1]) / 4
    lopsided = np.zeros((4, 4))
    lopsided[:3, :3] = lopsided[3, 3] = 1
    assert measures.effective_layers(lopsided) == pytest.approx(math.exp(-np.sum(sizes * np.log(sizes))))


def test_sixteen_blocks_are_far_apart_beyond_eight_steps():
    """The paper's definition: the mean over |i - j| > 8."""
    cka = np.random.default_rng(0).uniform(size=(16, 16))
    assert measures.long_range(cka) == pytest.approx(np.mean([cka[i, j] for i in range(16) for j in range(16) if abs(i - j) > 8]))
    assert measures.mean_off_diagonal(cka) == pytest.approx(np.mean([cka[i, j] for i in range(16) for j in range(16) if i != j]))


@pytest.mark.parametrize(("size", "quarter"), [(1, 1), (4, 1), (5, 2), (7, 2), (8, 2), (9, 3), (16, 4)])
def test_a_quarter_is_rounded_up(size, quarter):
    cka = np.diag(np.arange(float(size)))
    assert measures.diagonal_last_quarter(cka) == np.arange(size)[-quarter:].mean()
    assert measures.diagonal_first_quarter(cka) == np.arange(size)[:quarter].mean()


@pytest.mark.parametrize(("diagonal", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_papers_published_diagonals_have_the_published_means(diagonal, expected):
    cka = np.diag(diagonal)
    assert measures.diagonal_mean(cka) == pytest.approx(expected[0], abs=1e-4)
    assert measures.diagonal_last_quarter(cka) == pytest.approx(expected[1], abs=1e-4)


def test_a_single_layer_has_no_redundancy():
    assert np.isnan(measures.mean_off_diagonal(np.ones((1, 1)))) and np.isnan(measures.long_range(np.ones((1, 1))))


def test_negative_eigenvalues_of_an_unbiased_estimate_count_as_zero():
    cka = np.array([[1.0, 1.2], [1.2, 1.0]])
    assert np.linalg.eigvalsh(cka).min() < 0
    assert measures.effective_layers(cka) == pytest.approx(1)


def test_effective_layers_of_a_matrix_with_a_hole_is_nan():
    cka = np.eye(4)
    cka[1, 1] = np.nan
    assert np.isnan(measures.effective_layers(cka))


@pytest.mark.parametrize("name", SCALARS)
def test_every_scalar_of_a_stack_is_that_of_each_of_its_matrices(name):
    factors = np.random.default_rng(1).normal(size=(3, 6, 9))
    stack = factors @ factors.swapaxes(1, 2)
    of = SCALARS[name].of
    np.testing.assert_allclose(of(stack), [of(matrix) for matrix in stack], rtol=1e-12)
    assert of(stack).shape == (3,) and len(set(of(stack))) == 3


def test_the_kinds_of_input_of_each_scalar():
    kinds = {name: (scalar.first, scalar.second) for name, scalar in SCALARS.items()}
    for name, pair in kinds.items():
        both = ("adversarial",) * 2 if name.endswith("_adversarial") else ("clean", "clean")
        assert pair == (("clean", "adversarial") if name.startswith("clean_adversarial") else both), name


# Estimates of similarities


def test_an_estimate_is_the_scalar_of_the_whole_and_its_jackknife_leaves_out_a_batch_at_a_time():
    """120 batches, more than are handled at a time."""
    factors = np.random.default_rng(0).normal(size=(120, 4, 6))
    products = factors @ factors.swapaxes(1, 2)
    similarity = similarity_of(np.eye(4), batches=120)
    key = ("net", "clean")
    similarity.products[key, key][:], similarity.norms[key][:] = products, np.diagonal(products, axis1=1, axis2=2)
    found = estimate(similarity, SCALARS["redundancy"], "net", "net")

    def redundancy(total: np.ndarray) -> float:
        return measures.mean_off_diagonal(total / np.sqrt(np.outer(total.diagonal(), total.diagonal())))

    whole = redundancy(products.sum(0))
    pseudo = np.array([120 * whole - 119 * redundancy(products.sum(0) - product) for product in products])
    assert found.value == pytest.approx(whole)
    np.testing.assert_allclose(found.deviations, pseudo - pseudo.mean(), atol=1e-9)
    half = scipy.stats.t.ppf(0.975, 119) * pseudo.std(ddof=1) / math.sqrt(120)
    assert found.interval == pytest.approx((whole - half, whole + half))


@pytest.mark.parametrize(("batches", "has"), [(1, False), (2, False), (4, False), (5, True)])
def test_with_few_batches_there_is_a_value_and_no_interval(batches, has):
    found = estimate(similarity_of(np.eye(4), batches=batches), SCALARS["redundancy"], "net", "net")
    assert found.value == 0 and bool(np.isfinite(found.interval).all()) is has


def test_more_batches_make_a_narrower_interval():
    widths = []
    for batches in (16, 256):
        similarity = similarity_of(np.ones((1, 1)), batches=batches)
        pair = (("net", "clean"), ("net", "adversarial"))
        similarity.products[pair][:, 0, 0] = np.random.default_rng(0).normal(0.6, 0.2, size=batches)
        low, high = estimate(similarity, SCALARS["clean_adversarial"], "net", "net").interval
        widths.append(high - low)
    assert 0 < 2 * widths[1] < widths[0]


def test_dead_layers_and_those_not_asked_for_do_not_count():
    cka = np.array([[1, 0.5, np.nan, 0.1], [0.5, 1, np.nan, 0.3], [np.nan] * 4, [0.1, 0.3, np.nan, 1]])
    similarity, scalar = similarity_of(np.nan_to_num(cka), batches=6), SCALARS["redundancy"]
    assert np.isnan(similarity.cka(("net", "clean"), ("net", "clean"))[2]).all()
    found = estimate(similarity, scalar, "net", "net")
    assert found.value == pytest.approx(0.3) and found.interval == pytest.approx((0.3, 0.3))
    counted = np.array([True, True, True, False])
    assert estimate(similarity, scalar, "net", "net", rows=counted, columns=counted).value == pytest.approx(0.5)
    alive_elsewhere = np.array([True, False, True, True])
    assert estimate(similarity, scalar, "net", "net", chosen=alive_elsewhere).value == pytest.approx(0.1)
    dead = np.array([False, False, True, False])
    nothing = estimate(similarity, scalar, "net", "net", rows=dead, columns=dead)
    assert np.isnan(nothing.value) and np.isnan(nothing.interval).all()


def test_two_models_can_be_estimated_where_only_their_own_pair_was_kept():
    rows, products = (Layer("a", "Linear", (1,)), Layer("b", "Linear", (1,))), np.full((3, 2, 2), 0.5)
    keys = (("first", "clean"), ("second", "clean"))
    similarity = Similarity(dict.fromkeys(keys, rows), {keys: products}, dict.fromkeys(keys, np.ones((3, 2))), (8, 8, 8))
    assert estimate(similarity, Scalar(measures.diagonal_mean), "first", "second").value == 0.5


def test_layers_of_two_models_are_paired_in_order_and_a_pair_with_a_dead_one_does_not_count():
    """Rows 0, 2 and 3 of the first with columns 1, 2 and 4 of the second; row 2 is dead."""
    keys, cka = (("first", "clean"), ("second", "clean")), np.arange(20.0).reshape(4, 5) / 20
    norms = {keys[0]: np.array([[1.0, 1, 0, 1]] * 3), keys[1]: np.ones((3, 5))}
    rows = {key: tuple(Layer(str(number), "Linear", (1,)) for number in range(norm.shape[1])) for key, norm in norms.items()}
    similarity = Similarity(rows, {keys: np.stack([cka] * 3)}, norms, (8, 8, 8))
    chosen = {"rows": np.array([1, 0, 1, 1], dtype=bool), "columns": np.array([0, 1, 1, 0, 1], dtype=bool)}
    for place, (first, second) in enumerate([("first", "second"), ("second", "first")]):
        masks = chosen if place == 0 else {"rows": chosen["columns"], "columns": chosen["rows"]}
        found = estimate(similarity, Scalar(measures.diagonal_mean), first, second, **masks)
        assert found.value == pytest.approx((cka[0, 1] + cka[3, 4]) / 2)
        np.testing.assert_allclose(found.deviations, 0, atol=1e-12)


# RankMe


def rankme_definition(features: np.ndarray) -> float:
    """Garrido et al. 2023, eq. 1, from singular values."""
    values = torch.linalg.svdvals(torch.from_numpy(features).double())
    shares = values / values.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


@pytest.mark.parametrize("shape", [(200, 12), (40, 40), (30, 500)], ids=str)
def test_rankme_equals_its_definition_by_singular_values(shape):
    features = np.random.default_rng(0).normal(size=shape).astype(np.float32) + 0.5
    features *= np.linspace(0.01, 3, shape[1], dtype=np.float32)
    assert measures.rankme(features) == pytest.approx(rankme_definition(features), rel=1e-5)


def test_rankme_of_equal_directions_is_their_number():
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 6)))[0]
    assert measures.rankme(directions) == pytest.approx(6, rel=1e-5)
    assert measures.rankme(np.outer(np.arange(1.0, 9), np.ones(3))) == pytest.approx(1, rel=1e-4)


def test_the_jackknife_interval_holds_the_value_and_follows_its_scatter():
    """RankMe's own spread over 60 samples is about what the interval of one sample says."""
    generator, scale = np.random.default_rng(0), np.linspace(0.1, 2, 8)
    samples = [generator.normal(size=(400, 8)) * scale for _ in range(60)]
    values = np.array([measures.rankme(sample) for sample in samples])
    intervals = np.array([measures.rankme_interval(sample, blocks=20) for sample in samples])
    assert ((intervals[:, 0] < values) & (values < intervals[:, 1])).all()
    errors = (intervals[:, 1] - intervals[:, 0]) / 2 / scipy.stats.t.ppf(0.975, 19)
    assert 0.7 < errors.mean() / values.std(ddof=1) < 1.4


@pytest.mark.parametrize(("blocks", "has"), [(1, False), (4, False), (5, True)])
def test_few_blocks_have_no_interval(blocks, has):
    assert bool(np.isfinite(measures.rankme_interval(np.random.default_rng(0).normal(size=(20, 3)), blocks=blocks)).all()) is has


def test_a_dead_encoder_has_no_rank():
    """Quietly: warnings are errors here."""
    assert np.isnan(measures.rankme(np.zeros((20, 3)))) and np.isnan(measures.rankme_interval(np.zeros((20, 3)), blocks=5)).all()
