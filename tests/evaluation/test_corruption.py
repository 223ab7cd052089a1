"""Accuracy under corruptions: images are corrupted as they are numbered, counted once each, and resumed by corruption."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advml.config import Corruptions
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.data.corruptions.cifar_c import Published
from advml.data.corruptions.corruptions import corrupt
from advml.data.datasets import Split
from advml.evaluation.corruption import describe, metrics, one
from advml.evaluation.intervals import clustered, wilson

CPU = Machine(torch.device("cpu"))
SPEC = Corruptions(names=["gaussian_noise", "brightness"], severities=(1, 5), seed=3)


class Light(nn.Module):
    """Class 1 if the image's mean is above a half. Keeps what it has seen, as levels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.seen.append((images * 255).round().to(torch.uint8))
        bright = images.mean((1, 2, 3)) > 0.5
        return torch.stack([~bright, bright], 1).float()


def split(count: int = 11, side: int = 8, channels: int = 1) -> Split:
    generator = torch.Generator().manual_seed(0)
    levels = torch.linspace(60, 180, count)[torch.randperm(count, generator=generator)]
    images = levels.view(-1, 1, 1, 1) + 30 * torch.rand(count, channels, side, side, generator=generator)
    return Split(images.round().to(torch.uint8), (levels > 127).long())


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_one_corruption_gives_a_row_per_severity(batch_size):
    images, network = split(), Light()
    right = one(network, images, SPEC, "brightness", machine=CPU, batch_size=batch_size)
    assert (right.dtype, right.shape) == (torch.bool, (2, 11))
    for row, severity in zip(right, (1, 5), strict=True):
        corrupted = corrupt("brightness", images.images, severity=severity, seed=3)
        means = corrupted.double().mean((1, 2, 3)) / 255
        assert row.tolist() == ((means > 0.5).long() == images.labels).tolist()
    seen = torch.cat(network.seen)
    assert torch.equal(seen[11:], corrupt("brightness", images.images, severity=5, seed=3))


def test_the_random_part_does_not_depend_on_the_batches():
    seen = []
    for batch_size in (3, 11):
        network = Light()
        one(network, split(), SPEC, "gaussian_noise", machine=CPU, batch_size=batch_size)
        seen.append(torch.cat(network.seen))
    assert torch.equal(*seen)


def test_a_limit_takes_the_first_images():
    network = Light()
    spec = SPEC.model_copy(update={"images": 5})
    right = one(network, split(), spec, "gaussian_noise", machine=CPU, batch_size=2)
    assert right.shape == (2, 5)
    assert [len(seen) for seen in network.seen] == [2, 2, 1] * 2
    assert torch.equal(right, one(Light(), split(), SPEC, "gaussian_noise", machine=CPU, batch_size=9)[:, :5])


# Published files


def files(tmp_path, images: Split, order: list[int], labels: Tensor | None = None) -> Published:
    """brightness.npy: severity s of an image is its levels plus s, in the file's own order of rows."""
    rows = np.argsort(order)
    blocks = [images.images[order].permute(0, 2, 3, 1).numpy() + np.uint8(severity) for severity in range(1, 6)]
    np.save(tmp_path / "brightness.npy", np.concatenate(blocks))
    np.save(tmp_path / "labels.npy", np.tile((images.labels if labels is None else labels)[order].numpy(), 5).astype(np.uint8))
    return Published(tmp_path, rows)


def test_a_published_file_is_read_instead_in_the_order_of_the_split(tmp_path):
    images, network = split(6, 32, 3), Light()
    published = files(tmp_path, images, [3, 1, 5, 0, 4, 2])
    one(network, images, SPEC, "brightness", machine=CPU, batch_size=4, published=published)
    seen = torch.cat(network.seen)
    assert torch.equal(seen, torch.cat([images.images + 1, images.images + 5]))
    computed = [one(Light(), images, SPEC, "gaussian_noise", machine=CPU, batch_size=4, published=found) for found in (published, None)]
    assert torch.equal(*computed)


def test_files_of_another_data_set_are_noticed(tmp_path):
    images = split(6, 32, 3)
    published = files(tmp_path, images, [0, 1, 2, 3, 4, 5], labels=1 - images.labels)
    with pytest.raises(UserError, match=r"corruptions\.folder"):
        one(Light(), images, SPEC, "brightness", machine=CPU, batch_size=4, published=published)


# Figures


def test_metrics_are_means_over_severities_then_over_corruptions():
    results = {"fog": torch.tensor([[True, True, False, True], [False, True, False, True]]), "snow": torch.zeros(2, 4, dtype=torch.bool)}
    flat = metrics(results)
    assert {name: flat[f"corruption/{name}"] for name in ("fog", "snow", "mean")} == {"fog": 5 / 8, "snow": 0, "mean": 5 / 16}
    assert (flat["corruption/fog/low"], flat["corruption/fog/high"]) == clustered([0.5, 1, 0, 1], looks=2)
    assert (flat["corruption/snow/low"], flat["corruption/snow/high"]) == wilson(0, 4)
    assert (flat["corruption/mean/low"], flat["corruption/mean/high"]) == clustered([0.25, 0.5, 0, 0.5], looks=4)
    assert len(flat) == 9


def test_looks_that_agree_count_once_and_independent_looks_all():
    assert clustered([1] * 30 + [0] * 10, looks=5) == pytest.approx(wilson(30, 40))
    shares = torch.randint(0, 2, (75, 400), generator=torch.Generator().manual_seed(0)).double().mean(0).tolist()
    low, high = clustered(shares, looks=75)
    expected = wilson(15000, 30000)
    assert high - low == pytest.approx(expected[1] - expected[0], rel=0.1)


def test_looks_that_make_up_for_one_another_are_no_more_than_looks():
    assert clustered([0.5] * 39 + [0.6], looks=10) == pytest.approx(wilson(0.5025 * 400, 400))


@pytest.mark.parametrize("value", [0.0, 0.3, 0.4, 1.0])
def test_images_that_are_all_alike_leave_the_doubt_of_so_many_images(value):
    low, high = clustered([value] * 20, looks=5)
    assert (low, high) == pytest.approx(wilson(20 * value, 20), abs=1e-12)
    assert low <= value <= high and high - low > 0.1


def test_the_interval_covers_the_truth_in_95_of_100_test_sets():
    """Images of unequal difficulty, beta-distributed, ten looks each."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        difficulty = generator.beta(1.2, 0.4, 60)
        low, high = clustered((generator.binomial(10, difficulty) / 10).tolist(), looks=10)
        covered += low <= 0.75 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_the_record_tells_how_to_measure_it_again(tmp_path):
    images = split(6, 32, 3)
    published = files(tmp_path, images, [0, 1, 2, 3, 4, 5])
    about = {"machine": CPU, "batch_size": 4, "published": published}
    results = {name: one(Light(), images, SPEC, name, **about) for name in SPEC.names}
    described = json.loads(json.dumps(describe(results, SPEC, published=published)))
    noise, read = described["corruption/gaussian_noise"], described["corruption/brightness"]
    assert (noise["source"], noise["seed"], noise["kind"], noise["severities"], noise["n"]) == ("computed", 3, "noise", [1, 5], 6)
    assert {"library", "numpy", "PIL", "scipy", "torch"} <= noise.keys()
    assert (read["source"], "seed" in read) == (tmp_path.name, False)
    assert read["accuracies"] == results["brightness"].double().mean(1).tolist()
    assert read["interval"] == list(clustered(results["brightness"].double().mean(0).tolist(), looks=2))
