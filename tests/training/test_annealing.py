"""DynACL's schedules against their formulas, and ACL's two streams against a transcription."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from advml import config
from advml.attacks.pgd import Adversary
from advml.attacks.threat_model import ThreatModel
from advml.core.device import generator_for
from advml.data.augment import view, weakened
from advml.recipes import SCHEMES
from advml.training.annealing import term_weights, view_strength
from advml.training.losses import contrastive_views
from advml.training.tasks import pretraining_task

CONFIG = config.load(Path(__file__).parents[2] / "params.yaml")
PLAIN = {"batch_size": 16, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "schedule": "constant"}
SIMCLR = config.View(resized_crop=(0.1, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grey=0.2)


def test_views_weaken_and_weights_shift_every_so_many_epochs():
    """T = 1000 and K = 50, as in the paper; e counts from 1."""
    phase = config.Phase(epochs=1000, weight_annealing=50, **PLAIN)
    for epoch in (1, 49, 50, 51, 100, 101, 500, 999, 1000):
        assert view_strength(50, epoch=epoch, epochs=1000) == pytest.approx(1 - math.floor((epoch - 1) / 50) * 50 / 1000)
        w = min(1 + math.floor(epoch / 50) * (50 / 1000) * 2 / 3, 2)
        assert term_weights(phase, epoch=epoch, epochs=1000) == pytest.approx(((2 - w) / 2, w / 2))
    assert view_strength(None, epoch=7, epochs=9) == 1
    assert term_weights(config.Phase(epochs=9, clean_weight=0.5, adversarial_weight=3, **PLAIN), epoch=7, epochs=9) == (0.5, 3)


@pytest.mark.parametrize("s", [0.0, 0.35, 1.0])
def test_weak_views_have_the_ranges_of_the_paper(s):
    weak = weakened(SIMCLR, s)
    assert weak.resized_crop == pytest.approx((1 - 0.9 * s, 1.0)) and weak.flip == 0.5
    assert (weak.brightness, weak.contrast, weak.saturation, weak.hue) == pytest.approx((0.4 * s, 0.4 * s, 0.4 * s, 0.1 * s))
    assert (weak.jitter, weak.grey) == pytest.approx((0.8 * s, 0.2 * s))


def test_views_of_no_strength_are_the_images(dataset):
    images = dataset.train.images[:8].float() / 255
    weak = weakened(config.View(rotation=20, scale=(0.8, 1.2), shift=0.2, pad=2, brightness=0.4), 0.0)
    assert torch.equal(view(images, weak, generator=generator_for("x")), images)
    assert weakened(SIMCLR, 1.0) is SIMCLR


def test_the_second_stream_perturbs_both_views_against_each_other(dataset, make_network):
    """Jiang et al. 2020: d1, d2 ascend L(t1(x) + d1, t2(x) + d2) together; here two steps from the views, of the sign."""
    network = make_network().eval()
    phase = config.Phase(epochs=1, attacked="views", **PLAIN)
    task = pretraining_task(network, SCHEMES["CL"], phase, spec=CONFIG.views.contrastive, temperature=0.2)
    images, labels = dataset.train.images[:12].float() / 255, dataset.train.labels[:12]
    views = task.views(images, generator=generator_for("x"))
    adversary = Adversary(ThreatModel("linf", 0.1), steps=2, step_size=0.07, random_start=False, keep="last")
    attacked = task.attacked(images, views)
    ours = adversary.attack(network, lambda: task.training_objective(attacked, labels), attacked, generator=generator_for("y"))

    first, second = (one.clone() for one in views.chunk(2))
    d = [torch.zeros_like(first), torch.zeros_like(second)]
    for _ in range(2):
        both = [(one + moved).requires_grad_() for one, moved in zip((first, second), d, strict=True)]
        loss = contrastive_views(torch.stack([network.embed(one) for one in both]), torch.arange(12), temperature=0.2).sum()
        gradients = torch.autograd.grad(loss, both)
        for place, (one, gradient) in enumerate(zip((first, second), gradients, strict=True)):
            moved = (d[place] + 0.07 * gradient.sign()).clamp(-0.1, 0.1)
            d[place] = (one + moved).clamp(0, 1) - one
    theirs = torch.cat([first + d[0], second + d[1]])
    assert (ours - theirs).abs().gt(1e-4).float().mean() < 0.01 and (ours - views).abs().max() <= 0.1 + 1e-6
    expected = contrastive_views(network.embed(theirs).unflatten(0, (2, -1)), torch.arange(12), temperature=0.2)
    torch.testing.assert_close(task.adversarial_loss(attacked, ours, labels), expected, atol=1e-2, rtol=1e-2)
