"""Comparisons of networks that differ in everything: what they end in, kinds of input, and what is read back."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from torch import nn

from advml.similarity import alternatives
from advml.similarity.alternatives import MEASURES
from advml.similarity.compare import Comparison, Panel, all_pairs, arrays, compare, describe, read
from advml.similarity.represent import to_npz

WHOLE = ("similarity.layers=all", "similarity.batch_size=8", f"similarity.measures=[cka, {', '.join(MEASURES)}]")


@pytest.fixture
def compared(make_study) -> Comparison:
    """A convolutional network at 8 x 8 and a fully connected one at 4 x 4, on the same 60 images, clean and noisy."""
    torch.manual_seed(0)
    networks = {
        "wide": nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 5)).eval(),
        "flat": nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh()).eval(),
    }
    images = torch.rand(60, 1, 8, 8)
    noisy = images + 0.1 * torch.randn(60, 1, 8, 8)
    views = {}
    for kind, given in (("clean", images), ("adversarial", noisy)):
        views["wide", kind] = lambda place, given=given: given[place]
        views["flat", kind] = lambda place, given=given: nn.functional.avg_pool2d(given, 2)[place]
    panels = [Panel("models", "wide", "flat"), Panel("layers", "flat", "flat")]
    return compare(networks, views, 60, panels, make_study().config(*WHOLE).similarity)


def test_ends_are_the_last_layers_of_the_encoders_under_every_measure(compared):
    """The linear layer that `wide` ends in is its classifier."""
    keys = list(compared.similarity.norms)
    names = {model: [row.name for row in rows] for (model, _), rows in compared.similarity.rows.items()}
    assert names["wide"][-1] == "3" and not compared.similarity.rows["wide", "clean"][-1].in_encoder
    last = {"wide": -2, "flat": -1}
    for measure, ends in compared.ends.items():
        assert ends.shape == (4, 4)
        for kind in ("clean", "adversarial"):
            panel, places = compared.panels[0], (keys.index(("wide", kind)), keys.index(("flat", kind)))
            expected = compared.matrix(panel, kind, measure=measure)[last["wide"], last["flat"]]
            assert ends[places] == pytest.approx(expected, abs=1e-9), measure
    np.testing.assert_allclose(compared.ends["cka"].diagonal(), 1)


def test_distances_are_a_metric(compared):
    """Symmetric, 0 for the same, and no way round is shorter."""
    found = compared.distances
    assert compared.distance == "shape"
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    np.testing.assert_allclose(found.diagonal(), 0, atol=2e-3)  # arccos near 1 doubles the digits that rounding takes
    np.testing.assert_allclose(np.cos(found), compared.ends["procrustes"], atol=1e-6)
    plain = replace(compared, tables={})
    assert plain.distance == "cka"
    np.testing.assert_allclose(np.cos(plain.distances), compared.ends["cka"], atol=1e-12)
    assert (found[:, None, :] <= found[:, :, None] + found[None] + 1e-6).all() and 0.1 < found.max() <= np.pi


def test_what_is_written_is_read_back(compared):
    described = json.loads(json.dumps(describe(compared)))
    found = read(io.BytesIO(to_npz(arrays(compared))), described)
    assert found.panels == compared.panels and found.kinds == compared.kinds and set(found.by_measure) == {"cka", *MEASURES}
    for panel in compared.panels:
        for kind in compared.kinds:
            for measure in compared.by_measure:
                np.testing.assert_array_equal(
                    found.matrix(panel, kind, measure=measure), compared.matrix(panel, kind, measure=measure), err_msg=measure
                )
    assert found.tables["rsa"].sizes == compared.tables["rsa"].sizes == (6,) * 10 and found.tables["knn"].sizes == ()


def test_of_many_images_features_are_pooled_of_the_chosen_ones_alone(make_study, monkeypatch):
    """So memory is bounded, whatever the test split."""
    monkeypatch.setattr(alternatives, "MOST_IMAGES", 24)
    torch.manual_seed(0)
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh()).eval(), torch.rand(60, 1, 4, 4)
    spec = make_study().config("similarity.layers=all", "similarity.batch_size=8", "similarity.measures=[cka, rsa]").similarity
    panel = Panel("", "net", "net")
    found = compare({"net": network}, {("net", "clean"): lambda place: images[place]}, 60, [panel], spec)
    places = alternatives.chosen(60)
    assert len(places) == 24 and describe(found)["measures"]["images"] == 24 and describe(found)["measures"]["of"] == 60
    linear = network[:2](images[places]).detach().numpy()
    expected = spearmanr(pdist(linear), pdist(np.tanh(linear))).statistic
    assert found.matrix(panel, "clean", measure="rsa")[-2, -1] == pytest.approx(expected, abs=1e-6)


def test_all_pairs_are_every_two():
    assert [(panel.first, panel.second) for panel in all_pairs(["a", "b", "c"])] == [("a", "b"), ("a", "c"), ("b", "c")]
