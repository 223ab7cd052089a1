"""What goes into a representation: which images each probe sees, which rows count, how images are batched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from advml import config as configuration
from advml.core.device import machine
from advml.core.errors import UserError
from advml.data.datasets import Split
from advml.similarity import measures
from advml.similarity import represent as representation
from advml.similarity.layers import Layer, layers
from advml.similarity.represent import _Features, counted_rows, paired_batches, represent, views_of_split


@pytest.fixture
def spec(make_study):
    return lambda *overrides: make_study(f"study{len(overrides)}").config(*overrides).similarity


@pytest.fixture
def cpu():
    return machine(configuration.Runtime(device="cpu", threads=1))


class Stub(nn.Module):
    """Two layers: the first hands on the mean of each channel doubled, the second its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scale(2), Scale(-1)

    def forward(self, images):
        return self.second(self.first(images.mean((2, 3))))


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values):
        return self.factor * values


def test_features_are_of_their_own_split_and_kind(dataset, cpu, spec):
    """train as far as asked for, validation, test clean and attacked: each told apart by its images."""
    network, adversarial = Stub(), torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    rows = tuple(layers(network, cpu.images(dataset.test.images[:2]), select=["all"]))
    features = _Features.of(network, rows, dataset, adversarial, spec("similarity.probe_images=10"), cpu)

    def means(images: torch.Tensor) -> np.ndarray:
        return (images.float() / (255 if images.dtype == torch.uint8 else 1)).mean((2, 3)).numpy()

    expected = {
        "train": (features.train, dataset.train.images[:10]),
        "validation": (features.validation, dataset.validation.images),
        "clean": (features.test["clean"], dataset.test.images[:12]),
        "adversarial": (features.test["adversarial"], adversarial),
    }
    for name, (found, images) in expected.items():
        np.testing.assert_allclose(found[0], 2 * means(images), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(found[1], -2 * means(images), rtol=1e-5, err_msg=name)
    for name, labels in {
        "train": dataset.train.labels[:10],
        "validation": dataset.validation.labels,
        "test": dataset.test.labels[:12],
    }.items():
        np.testing.assert_array_equal(features.labels[name], labels.numpy())


@pytest.mark.parametrize(("validation", "test", "strength"), [(-1, 1, 1e-6), (1, -1, 10.0)])
def test_the_strength_of_a_probe_is_chosen_on_validation_and_not_on_test(validation, test, strength):
    """Three quarters are of one class: a weak probe always says so. A strong one reads the feature, which is right on one split alone."""
    labels = (np.arange(200) % 4 == 0).astype(int)
    feature = (2.0 * labels - 1)[:, None] + np.random.default_rng(0).normal(0, 0.1, (200, 1))
    tests = {"clean": [test * feature], "adversarial": [-test * feature]}
    features = _Features([feature], [validation * feature], tests, dict.fromkeys(("train", "validation", "test"), labels))
    probe = features.probe(0, (1e-6, 10.0))
    assert probe.strength == strength and probe.accuracy["validation"] == {1e-6: 0.75, 10.0: 1.0}[strength]
    if strength == 10.0:
        assert (probe.accuracy["clean"], probe.accuracy["adversarial"]) == (features.probe(0, (10.0,)).accuracy["clean"], 1.0)


@pytest.mark.parametrize(
    ("asked", "batch", "sizes"), [(100, 30, [10] * 10), (100, 5, [5] * 20), (40, 30, [8] * 5), (359, 30, [30] * 11 + [29])]
)
def test_images_are_cut_into_ten_batches_or_more(dataset, cpu, spec, asked, batch, sizes):
    """Of eight images at least; the same images for every model and kind."""
    images = torch.arange(asked, dtype=torch.float32)[:, None, None, None].expand(asked, 1, 8, 8) / asked
    split = Split((255 * images).round().to(torch.uint8), torch.zeros(asked, dtype=torch.long))
    views = views_of_split({"a": images, "b": images + 1}, split, cpu)
    found = list(paired_batches(views, asked, spec(f"similarity.batch_size={batch}")))
    assert [len(each["a", "clean"]) for each in found] == sizes
    for key, shift in (("a", 0), ("b", 1)):
        torch.testing.assert_close(torch.cat([each[key, "adversarial"] for each in found]), images + shift)
        torch.testing.assert_close(torch.cat([each[key, "clean"] for each in found]), split.images.float() / 255)


def layer(name: str, *, block: bool = False, encoder: bool = True) -> Layer:
    return Layer(name, "", (1,), in_encoder=encoder, is_block=block)


def test_all_rows_of_the_encoder_count_or_only_blocks_where_nothing_else_was_recorded():
    head, output = layer("classifier", encoder=False), layer("encoder")
    blocks = (layer("encoder.1", block=True), layer("encoder.2", block=True))
    assert counted_rows((*blocks, output, head)).tolist() == [True, True, False, False]
    everything = (layer("encoder.conv"), layer("encoder.act"), *blocks, output, head)
    assert counted_rows(everything).tolist() == [True] * 5 + [False]
    assert counted_rows((layer("encoder.conv"), head)).tolist() == [True, False]


def test_rankme_and_the_metrics_probe_are_of_the_encoders_last_row_and_named(make_network, dataset, cpu, spec):
    network, adversarial = make_network(), dataset.test.images.float() / 255
    asked = spec("similarity.probe_strengths=[0.1]", "similarity.layers=[conv1, layer1, classifier]")
    found = represent(network, dataset, adversarial, asked, cpu)
    names = [each.name for each in found.layers]
    assert names[found.last] != names[0] and found.layers[found.last].in_encoder and not found.layers[-1].in_encoder
    features = _Features.of(network, found.layers, dataset, adversarial, asked, cpu).test["clean"]
    assert found.rankme[0] == pytest.approx(measures.rankme(features[found.last])) != pytest.approx(measures.rankme(features[0]))
    metrics = representation.metrics(found)
    assert metrics["probe/clean"] == found.probes[found.last].accuracy["clean"]
    about = representation.describe(found, asked, of={}, attack={})
    assert about["last_layer"] == names[found.last]


def test_dead_layers_are_listed_and_living_ones_are_not(make_network, dataset, cpu, spec):
    network = make_network()
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.zero_()
    asked = spec("similarity.probe_strengths=[0.1]", "similarity.layers=blocks")
    found = represent(network, dataset, dataset.test.images.float() / 255, asked, cpu)
    about = representation.describe(found, asked, of={}, attack={})
    assert about["dead_layers"] == {"clean": ["classifier"], "adversarial": ["classifier"]}
    assert np.isfinite([each for name, each in representation.metrics(found).items() if name.count("/") == 1]).all()


@pytest.mark.parametrize(
    ("count", "overrides", "told"),
    [(3, [], "evaluate.adversarial_images"), (40, ["similarity.layers=[classifier]"], "selects no layer of the encoder, only classifier")],
)
def test_what_cannot_be_measured_is_one_line(make_network, dataset, cpu, spec, count, overrides, told):
    with pytest.raises(UserError, match=told) as refused:
        represent(make_network(), dataset, torch.rand(count, 1, 8, 8), spec(*overrides), cpu)
    assert "\n" not in str(refused.value)


def test_too_few_batches_leave_values_without_intervals(make_network, dataset, cpu, spec):
    some = replace(dataset, test=Split(dataset.test.images[:20], dataset.test.labels[:20]))
    asked = spec("similarity.probe_strengths=[0.1]", "similarity.layers=blocks")
    found = represent(make_network(), some, some.test.images.float() / 255, asked, cpu)
    metrics, about = representation.metrics(found), representation.describe(found, asked, of={}, attack={})
    assert np.isfinite([metrics["cka/redundancy"], metrics["probe/clean/low"]]).all() and np.isnan(metrics["cka/redundancy/low"])
    assert about["intervals"]["cka"].startswith("none: 3 batches")
    assert representation.WANTED_BATCHES == 10
