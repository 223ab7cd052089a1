"""The loop against foolbox, closed forms, and a sentinel for side effects."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from advml.attacks.pgd import STEP_SCHEDULES, accumulate, default_step_size, pgd
from advml.attacks.threat_model import NORMS, ThreatModel
from advml.models.network import Architecture, Network, build
from advml.training.losses import contrastive_views, cross_entropy

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox imports scipy.ndimage.filters
    import foolbox

EPSILON = {"linf": 0.1, "l2": 0.8}
BOTH = pytest.mark.parametrize("norm", sorted(EPSILON))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_network() -> Network:
    return build(Architecture("test_resnet", "small", {}, 1, 8, (0.4,), (0.3,), 10, None, False, False), seed=0).eval()


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 1, 8, 8, generator=seeded()), torch.arange(count) % 10


def embed(images: Tensor) -> Tensor:
    """The simplest encoder: pixels on the unit sphere."""
    return F.normalize(images.flatten(1) - 0.5, dim=1)


# Peers and closed forms


@BOTH
@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_from_a_zero_start_equals_foolboxs(norm, steps):
    network, (images, labels), epsilon = small_network(), batch(), EPSILON[norm]
    attack = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm](abs_stepsize=epsilon / 4, steps=steps, random_start=False)
    theirs = attack.run(foolbox.PyTorchModel(network, bounds=(0, 1)), images, labels, epsilon=epsilon)
    ours = pgd(
        lambda x: cross_entropy(network(x), labels), images, threat_model=ThreatModel(norm, epsilon), steps=steps, step_size=epsilon / 4
    )
    assert (ours - images).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@BOTH
@pytest.mark.parametrize("start", ["zero", "random"])
def test_on_a_linear_objective_pgd_gains_exactly_epsilon_times_the_dual_norm(norm, start):
    weights = torch.randn(5, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    images = torch.full_like(weights, 0.5)  # the box is 0.5 away, the ball reaches 0.1
    threat_model = ThreatModel(norm, 0.1)
    first = threat_model.random_start(images, generator=seeded(1)) if start == "random" else None
    attacked = pgd(lambda x: (weights * x).flatten(1).sum(1), images, threat_model=threat_model, steps=60, step_size=0.1, start=first)
    gain = (weights * (attacked - images)).flatten(1).sum(1)
    bound = 0.1 * weights.flatten(1).norm(p={"linf": 1, "l2": 2}[norm], dim=1)
    torch.testing.assert_close(gain, bound, atol=0, rtol=1e-9)
    assert (gain <= bound * (1 + 1e-9)).all()


def test_the_default_step_is_two_and_a_half_times_epsilon_over_steps():
    assert default_step_size(0.2, 10) == pytest.approx(0.05)
    assert default_step_size(0.2, 1) == 0.2  # FGSM: more would leave the ball
    images, steps = torch.full((1, 1, 2, 2), 0.5), []
    pgd(lambda x: steps.append(x.detach()) or x.flatten(1).sum(1), images, threat_model=ThreatModel("linf", 0.2), steps=10)
    torch.testing.assert_close(steps[1] - steps[0], torch.full_like(images, 0.05))


# Which iterate is kept


def wave(x: Tensor) -> Tensor:
    """Rises and falls within the ball, at another pace for each image."""
    return torch.sin(torch.arange(3, 3 + len(x)) * 9 * x.flatten(1).mean(1))


@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    norm=st.sampled_from(sorted(EPSILON)), steps=st.integers(1, 6), seed=st.integers(0, 2**31), step_size=st.sampled_from([None, 0.01, 0.5])
)
def test_the_best_iterate_is_the_best_of_all_seen_and_lies_in_the_threat_model(norm, steps, seed, step_size):
    images = torch.rand(4, 1, 3, 3, generator=seeded(seed))
    threat_model, seen = ThreatModel(norm, EPSILON[norm]), []
    start = threat_model.random_start(images, generator=seeded(seed + 1))

    def objective(x: Tensor) -> Tensor:
        values = wave(x)
        seen.append(values.detach())
        return values

    arguments = {"threat_model": threat_model, "steps": steps, "step_size": step_size, "start": start}
    last = pgd(objective, images, **arguments)
    seen.clear()
    best = pgd(objective, images, keep="best", **arguments)
    torch.testing.assert_close(wave(best), torch.stack(seen).amax(0), atol=0, rtol=0)
    assert (wave(best) >= wave(last)).all() and (wave(best) >= wave(start)).all()
    size = NORMS[threat_model.norm].size
    assert best.min() >= 0 and best.max() <= 1 and (size(best - images) <= threat_model.epsilon + 2e-6).all()
    assert last.min() >= 0 and last.max() <= 1 and (size(last - images) <= threat_model.epsilon + 2e-6).all()


def test_the_start_is_the_first_iterate():
    images, seen = batch()[0], []
    start = ThreatModel("linf", 0.1).random_start(images, generator=seeded(3))
    pgd(lambda x: seen.append(x.detach()) or x.flatten(1).sum(1), images, threat_model=ThreatModel("linf", 0.1), steps=1, start=start)
    assert torch.equal(seen[0], start)


# The contrastive objective


def test_from_a_zero_start_the_positive_pair_has_no_gradient():
    """z.z' is largest at z' = z, so the first step from zero sees negatives only: why training starts at random."""
    images, groups = batch()[0], torch.arange(6)
    clean = embed(images)

    def gradient(values, at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(values(embed(at)).sum(), at)[0]

    def objective(z: Tensor) -> Tensor:
        return contrastive_views(torch.stack([clean, z]), groups, temperature=0.2)

    def negatives_only(z: Tensor) -> Tensor:
        """The objective's log denominators, with the similarity of the positive pair held constant."""
        both, itself = torch.cat([clean, z]), torch.eye(12, dtype=torch.bool)
        similarity = both @ both.T / 0.2
        similarity = torch.where(itself.roll(6, 1), similarity.detach(), similarity)
        return similarity.masked_fill(itself, float("-inf")).logsumexp(1) / 2

    assert gradient(lambda z: (clean * z).sum(1), images).abs().max() < 1e-6
    torch.testing.assert_close(gradient(objective, images), gradient(negatives_only, images), atol=1e-6, rtol=1e-4)
    random = ThreatModel("linf", 0.1).random_start(images, generator=seeded(1))
    assert (gradient(objective, random) - gradient(negatives_only, random)).abs().max() > 0.01


def test_an_objective_in_float32_keeps_a_float32_gradient_under_bf16_autocast():
    """Autocast would round the products of the backward pass too, and flip the sign of small gradients."""
    images, groups = torch.rand(64, 1, 8, 8, generator=seeded()), torch.arange(64)
    start = ThreatModel("l2", 0.8).random_start(images, generator=seeded(1))

    def objective(x: Tensor) -> Tensor:
        return contrastive_views(torch.stack([embed(images), embed(x)]), groups, temperature=0.07)

    expected = pgd(objective, images, threat_model=ThreatModel("l2", 0.8), steps=3, start=start)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attacked = pgd(objective, images, threat_model=ThreatModel("l2", 0.8), steps=3, start=start)
    assert torch.equal(attacked, expected)


# Momentum and schedules


def literal_attack(
    network: Network, images: Tensor, labels: Tensor, *, norm: str, steps: int, step_size: float, momentum: float, factors: list[float]
) -> Tensor:
    """Dong et al. 2018, alg. 1 image by image, with the sum of |g| of the paper, and step sizes from a list."""
    epsilon, attacked = EPSILON[norm], []
    for image, label in zip(images, labels, strict=True):
        x, velocity = image.clone(), torch.zeros_like(image)
        for factor in factors:
            x = x.detach().requires_grad_()
            loss = -torch.log_softmax(network(x[None]), 1)[0, label]
            (g,) = torch.autograd.grad(loss, x)
            velocity = momentum * velocity + g / g.abs().sum() if momentum else g
            direction = velocity.sign() if norm == "linf" else velocity / velocity.pow(2).sum().sqrt()
            d = x.detach() + step_size * factor * direction - image
            d = d.clamp(-epsilon, epsilon) if norm == "linf" else d * min(1.0, epsilon / float(d.pow(2).sum().sqrt()))
            x = (image + d).clamp(0, 1)
        attacked.append(x)
    assert len(factors) == steps
    return torch.stack(attacked)


LINEAR, COSINE = [1, 4 / 5, 3 / 5, 2 / 5, 1 / 5], [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]
OPTIONS = {
    "momentum": {"momentum": 0.9, "factors": [1] * 5},
    "momentum of 1": {"momentum": 1.0, "factors": [1] * 5},
    "linear": {"schedule": "linear", "momentum": 0.0, "factors": LINEAR},
    "cosine": {"schedule": "cosine", "momentum": 0.0, "factors": COSINE},
    "both": {"schedule": "cosine", "momentum": 0.75, "factors": COSINE},
}


@BOTH
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_momentum_and_schedules_follow_a_literal_transcription(norm, option):
    network, (images, labels) = small_network(), batch()
    factors = option["factors"]
    ours = {key: value for key, value in option.items() if key != "factors"}
    settings = {"threat_model": ThreatModel(norm, EPSILON[norm]), "steps": 5, "step_size": EPSILON[norm] / 3}
    attacked = pgd(lambda x: cross_entropy(network(x), labels), images, **settings, **ours)
    expected = literal_attack(
        network, images, labels, norm=norm, steps=5, step_size=EPSILON[norm] / 3, momentum=option["momentum"], factors=factors
    )
    torch.testing.assert_close(attacked, expected, atol=2e-6, rtol=0)
    plain = pgd(lambda x: cross_entropy(network(x), labels), images, **settings)
    assert (attacked - plain).abs().max() > 1e-3  # else nothing is tested


@pytest.mark.parametrize(("keep", "forwards"), [("last", 5), ("best", 6)])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "schedule": "cosine"}], ids=["plain", "momentum and schedule"])
def test_five_steps_take_five_passes_and_the_best_iterate_one_forward_pass_more(keep, forwards, options):
    images, passes, gradients = batch()[0], [], []

    def objective(x: Tensor) -> Tensor:
        passes.append(1)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradients.append(1))
        return x.flatten(1).square().sum(1)

    pgd(objective, images, threat_model=ThreatModel("linf", 0.1), steps=5, keep=keep, **options)
    assert (len(passes), len(gradients)) == (forwards, 5)


@pytest.mark.parametrize("schedule", STEP_SCHEDULES)
def test_a_schedule_begins_with_the_whole_step_and_wastes_none(schedule):
    factors = [STEP_SCHEDULES[schedule](step / 10) for step in range(10)]
    assert factors[0] == 1 and all(0 < after <= before for before, after in itertools.pairwise(factors))
    assert (factors[-1] <= 0.1) == (schedule != "constant")


def test_gradients_of_zeros_stay_zeros_and_the_smallest_ones_count():
    gradient = torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 1e-30), torch.full((1, 2, 2), 1e30)])
    first = accumulate(None, gradient, momentum=0.9)
    torch.testing.assert_close(first.flatten(1).mean(1), torch.tensor([0.0, 1.0, 1.0]))
    second = accumulate(first, -gradient, momentum=0.9)
    torch.testing.assert_close(second.flatten(1).mean(1), torch.tensor([0.0, -0.1, -0.1]))


def test_momentum_of_one_image_does_not_depend_on_the_others():
    network, (images, labels) = small_network(), batch()
    settings = {"threat_model": ThreatModel("l2", 0.8), "steps": 4, "momentum": 0.9}
    together = pgd(lambda x: cross_entropy(network(x), labels), images, **settings)
    alone = pgd(lambda x: cross_entropy(network(x), labels[2:3]), images[2:3], **settings)
    torch.testing.assert_close(together[2:3], alone, atol=1e-5, rtol=0)


# Side effects


@pytest.mark.parametrize("keep", ["last", "best"])
def test_pgd_touches_neither_its_inputs_nor_parameter_gradients(keep):
    images, labels = batch()
    layer = nn.Linear(64, 10)
    kept = layer.weight.grad = torch.ones_like(layer.weight)
    before, start = images.clone(), ThreatModel("linf", 0.1).random_start(images, generator=seeded(1))
    start_before, rng = start.clone(), torch.get_rng_state()
    attacked = pgd(
        lambda x: cross_entropy(layer(x.flatten(1)), labels), images, threat_model=ThreatModel("linf", 0.1), steps=3, start=start, keep=keep
    )
    assert torch.equal(images, before) and torch.equal(start, start_before)
    assert not images.requires_grad and not start.requires_grad and not attacked.requires_grad and attacked.grad_fn is None
    assert layer.weight.grad is kept and torch.equal(kept, torch.ones_like(kept)) and layer.bias.grad is None
    assert layer.weight.requires_grad and torch.equal(torch.get_rng_state(), rng)


def test_pgd_never_hands_out_the_callers_own_tensor():
    images = batch()[0]
    attacked = pgd(lambda x: 0 * x.flatten(1).sum(1), images, threat_model=ThreatModel("linf", 0.1), steps=1, keep="best")
    attacked.add_(1)
    assert images.max() <= 1


@pytest.mark.parametrize("keep", ["last", "best"])
def test_images_that_take_gradients_get_none(keep):
    images = batch()[0].requires_grad_()
    attacked = pgd(lambda x: x.flatten(1).sum(1), images, threat_model=ThreatModel("linf", 0.1), steps=3, keep=keep)
    assert attacked.grad_fn is None and not attacked.requires_grad and images.grad is None and images.requires_grad


def test_pgd_works_where_gradients_are_switched_off():
    images = batch()[0]
    with torch.no_grad():
        attacked = pgd(lambda x: x.flatten(1).sum(1), images, threat_model=ThreatModel("linf", 0.1), steps=3)
    torch.testing.assert_close(attacked, (images + 0.1).clamp(max=1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_of_a_gradient_is_not_finite_moves_nothing_and_the_rest_goes_on(norm, momentum):
    images = torch.full((2, 1, 2, 2), 0.5)
    images[0, 0, 0, 0] = 0  # where the derivative of the root is infinite
    moved = pgd(lambda x: (x + 0).sqrt().flatten(1).sum(1), images, threat_model=ThreatModel(norm, 0.1), steps=1, momentum=momentum)
    assert moved.isfinite().all() and moved[0, 0, 0, 0] == 0 and (moved[0].flatten()[1:] > 0.5).all() and (moved[1] > 0.5).all()
