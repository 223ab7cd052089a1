"""Models built to mask their gradients raise the right flags, honest ones none, and probing leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from advml.attacks.pgd import pgd
from advml.attacks.threat_model import ThreatModel
from advml.evaluation.masking.evidence import Evidence
from advml.evaluation.masking.probes import NOISE_DRAWS, probe
from advml.evaluation.masking.rules import flags
from advml.training.losses import cross_entropy

THREATS = {"linf": ThreatModel("linf", 0.15), "l2": ThreatModel("l2", 0.8)}


# Honest models of the digits


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and labels, shuffled."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(bunch.images / 16, dtype=torch.float32)[order, None], torch.tensor(bunch.target)[order]


TRAINING = slice(0, 1400)
SUBSET = slice(1400, 1500)


@cache
def trained(build: Callable[[], nn.Module], attack: ThreatModel | None = None, epochs: int = 8) -> nn.Module:
    """On clean images, or adversarially: on the images of three steps of PGD."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    generator = torch.Generator().manual_seed(0)
    images, labels = (part[TRAINING] for part in digits())
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * 10)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(140):
            x, y = images[rows], labels[rows]
            if attack:
                model.eval()
                start = attack.random_start(x, generator=generator)
                x = pgd(lambda x, y=y: cross_entropy(model(x), y), x, threat_model=attack, steps=3, start=start)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def measure(model: nn.Module, norm: str = "linf", **changes: object) -> Evidence:
    images, labels = (part[SUBSET] for part in digits())
    return probe(model, images, labels, **({"threat_model": THREATS[norm], "classes": 10, "steps": 10, "seed": 0} | changes))


# Masked models: each wraps an honest one and is as easily fooled


class Wrapped(nn.Module):
    """Around an honest model that maps images (N, C, H, W) to logits (N, K)."""

    def __init__(self, model: nn.Module, before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(self.before(images) if self.before else images)
        return self.after(logits) if self.after else logits


def wrapped(before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], Tensor] | None = None):
    return lambda model: Wrapped(model, before, after)


class _Backward(torch.autograd.Function):
    """The identity; backward, what `change` makes of the gradient."""

    @staticmethod
    def forward(ctx, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return images.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def backward(change: Callable[[Tensor], Tensor]):
    return wrapped(before=lambda images: _Backward.apply(images, change))


def broken(gradient: Tensor) -> Tensor:
    raise ValueError("no way back\nat all")


scaled = wrapped(after=lambda logits: 1e4 * logits)  # so large that the softmax of float32 is exactly 0 or 1
scaled_softmax = wrapped(after=lambda logits: 1e3 * logits.softmax(1))
softmax = wrapped(after=lambda logits: logits.softmax(1))
log_softmax = wrapped(after=lambda logits: logits.log_softmax(1))
unit_length = wrapped(after=lambda logits: F.normalize(logits, dim=1))  # saturated where the model is sure
quantised = wrapped(before=lambda images: (images * 7).round() / 7)  # a staircase, flat almost everywhere
detached = wrapped(before=lambda images: torch.from_numpy(images.numpy().round(1)))  # leaves PyTorch, as a JPEG codec does: no gradient
no_graph = wrapped(before=lambda images: images.detach())
random_layer = wrapped(before=lambda images: images + 0.1 * torch.randn_like(images))  # in eval mode, too
shattered = wrapped(before=lambda images: images + 0.005 * torch.sin(1e4 * images))  # fifty times as steep as the image
noisy_backward = backward(lambda gradient: torch.randn_like(gradient) * gradient.norm())
trickle = backward(lambda gradient: gradient * (torch.rand_like(gradient) < 0.05))  # an attack gets there, in twenty times the steps
reversed_backward = backward(lambda gradient: -gradient)
broken_backward = backward(broken)


class NaNGradient(Wrapped):
    """sqrt(0): the value is right, its derivative is infinite, and 0 times that is not a number."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) + 0 * (images - images.detach()).pow(2).flatten(1).sum(1, keepdim=True).sqrt()


class Fenced(Wrapped):
    """Has gradients only within `radius` (linf) of the images that it knows, so that a wider start finds none."""

    def __init__(self, model: nn.Module, images: Tensor, *, radius: float) -> None:
        super().__init__(model)
        self.register_buffer("known", images)
        self.radius = radius

    def forward(self, images: Tensor) -> Tensor:
        distance = torch.cdist(images.flatten(1), self.known.flatten(1), p=torch.inf).amin(1)
        return self.model(torch.where((distance <= self.radius).view(-1, 1, 1, 1), images, images.detach()))


class BatchDependent(Wrapped):
    """Batch norm that is never switched to eval mode: a prediction depends on who else is in the batch."""

    def train(self, mode: bool = True) -> BatchDependent:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = True
        return self


# Flags


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("build", [linear, convolutional])
@pytest.mark.parametrize("adversarial", [False, True], ids=["standard", "adversarial"])
def test_an_honest_model_raises_no_flag(build, norm, adversarial):
    evidence = measure(trained(build, THREATS[norm] if adversarial else None), norm)
    assert flags(evidence) == []
    counts = [point.right for point in evidence.curve]
    assert counts == sorted(counts, reverse=True) and counts[0] == evidence.n > 75 and counts[-1] == 0


BLIND = {"curve_above_chance", "black_box_stronger", "dead_gradients"}
MASKED = {  # the flags that are due; others may be raised as well
    "saturated logits": (scaled, BLIND),
    "saturated softmax": (scaled_softmax, {"curve_above_chance", "dead_gradients", "softmax_output"}),
    "softmax": (softmax, {"softmax_output"}),
    "log-softmax": (log_softmax, {"softmax_output"}),
    "quantised": (quantised, BLIND),
    "detached": (detached, BLIND),
    "no graph": (no_graph, BLIND),
    "broken backward": (broken_backward, BLIND),
    "random": (random_layer, {"randomised"}),
    "shattered": (shattered, {"black_box_stronger", "misleading_gradients"}),
    "noisy backward": (noisy_backward, {"black_box_stronger", "misleading_gradients"}),
    "reversed backward": (reversed_backward, {"curve_above_chance", "black_box_stronger", "misleading_gradients"}),
    "infinite": (NaNGradient, {"curve_above_chance", "dead_gradients"}),
    "batch": (BatchDependent, {"success_lost"}),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_model_raises_its_flags(name):
    wrap, expected = MASKED[name]
    assert expected <= {flag.name for flag in flags(measure(wrap(trained(convolutional))))}


@pytest.mark.parametrize("name", ["saturated logits", "quantised", "shattered", "noisy backward", "random", "batch"])
def test_a_masked_model_raises_a_flag_when_it_is_robust_and_in_l2_too(name):
    wrap, expected = MASKED[name]
    raised = {flag.name for flag in flags(measure(wrap(trained(convolutional, THREATS["l2"])), "l2"))}
    assert expected - {"black_box_stronger", "curve_above_chance"} <= raised  # noise as wide as the box is of one class


def test_a_curve_that_rises_is_flagged_with_the_samples_regained():
    images = digits()[0][SUBSET]
    evidence = measure(Fenced(trained(convolutional), images, radius=0.16))
    flag = next(flag for flag in flags(evidence) if flag.name == "curve_not_monotone")
    assert flag.saw.startswith(
        f"accuracy rises with epsilon: {evidence.rise.regained} of {evidence.n} samples break at 0.15 but not at 0.3,"
    )


def test_a_fence_around_the_image_itself_makes_one_step_stronger_than_many():
    images = digits()[0][SUBSET]
    evidence = measure(Fenced(trained(convolutional), images, radius=0.01))
    flag = next(flag for flag in flags(evidence) if flag.name == "single_step_stronger")
    assert f"breaks {evidence.single_step_only} of {evidence.n} samples that 10 steps of PGD do not" in flag.saw
    assert evidence.zero_clean == 0 and evidence.zero_random == evidence.n


def test_a_loss_that_rises_to_the_last_step_is_flagged_and_more_steps_proposed():
    evidence = measure(trickle(trained(convolutional)), steps=20)
    flag = next(flag for flag in flags(evidence) if flag.name == "loss_still_rising")
    assert f"on the {evidence.survivors} samples that survive it" in flag.saw and "80 instead of 20" in flag.try_


def test_saturated_logits_of_unit_length_are_flagged_and_more_steps_of_the_same_length_do_break_more():
    """As in the paper's protocol. More but shorter steps would change nothing; what the flag proposes does."""
    images, labels = digits()
    images, labels = images[labels < 2], labels[labels < 2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = unit_length(nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    images, labels, threat_model = images[:100], labels[:100], ThreatModel("l2", 1.2)
    evidence = probe(model, images, labels, threat_model=threat_model, classes=2, steps=20, seed=0, shares=())
    (flag,) = (flag for flag in flags(evidence) if flag.name == "loss_still_rising")
    assert "80 instead of 20, each of 0.15" in flag.try_

    def surviving(step_size: float) -> int:
        moved = pgd(
            lambda x: cross_entropy(model(x), labels), images, threat_model=threat_model, steps=80, step_size=step_size, keep="best"
        )
        return int((model(moved).argmax(1) == labels).sum())

    assert surviving(0.15) < 0.85 * evidence.survivors < surviving(0.15 / 4)


# What was measured


def test_the_numbers_of_dead_gradients_are_those_of_the_model():
    saturated, flat = (measure(wrap(trained(convolutional))) for wrap in (scaled, quantised))
    assert (saturated.zero_clean, saturated.zero_margin) == (saturated.n, 0)
    assert (flat.zero_clean, flat.zero_random, flat.zero_margin) == (flat.n,) * 3
    assert flat.slope_kept is None and saturated.slope_kept == pytest.approx(1, abs=0.1)
    assert measure(NaNGradient(trained(convolutional))).non_finite == saturated.n


def test_a_linear_model_keeps_all_that_its_gradient_promises():
    assert measure(trained(linear)).slope_kept == pytest.approx(1, abs=1e-3)


def test_the_curve_reaches_from_clean_accuracy_to_the_whole_box():
    for norm, widest in (("linf", 1.0), ("l2", 8.0)):
        curve = measure(trained(linear), norm, steps=2, shares=(0.5, 100)).curve
        assert [point.epsilon for point in curve] == [0, THREATS[norm].epsilon / 2, THREATS[norm].epsilon, widest]
        assert all(point.accuracy == point.right / 100 and point.low < point.high for point in curve)


def test_passes_are_counted():
    evidence = measure(trained(linear), shares=(1,), steps=3)
    share = 100 / evidence.n
    assert evidence.backward == 2 * 3 + 5  # two epsilons; FGSM, three gradients, the slope
    most = evidence.backward + 2 * share + 2 * 2 + 4 + NOISE_DRAWS  # PGD's last value and its score; FGSM's score, the slope's, again twice
    assert most - NOISE_DRAWS < evidence.forward <= most


def test_verdicts_handed_in_are_compared_with_each_other():
    model = trained(convolutional, THREATS["linf"])
    plain = measure(model)
    everything_broken, nothing_broken = torch.zeros(100, dtype=torch.bool), torch.ones(100, dtype=torch.bool)
    beaten = measure(model, black_box={"square": everything_broken, "transfer": nothing_broken})
    assert beaten.black_box == plain.black_box | {"square": plain.white_box_right, "transfer": 0}
    (flag,) = flags(beaten)
    assert f"square {plain.white_box_right} of {plain.n}" in flag.saw and "transfer" not in flag.saw
    broken_before = measure(model, white_box=everything_broken, black_box={"square": everything_broken})
    assert broken_before.white_box_right == 0 and flags(broken_before) == []


def test_evidence_is_the_same_every_time_and_another_under_another_seed():
    model = random_layer(trained(convolutional))
    first, again, other = measure(model, steps=3), measure(model, steps=3), measure(model, steps=3, seed=1)
    assert first == again != other


def test_model_and_random_numbers_stay_as_they_are():
    model = BatchDependent(random_layer(trained(convolutional))).train()
    model.model.model[0].weight.requires_grad_(True).grad = torch.ones_like(model.model.model[0].weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    images = digits()[0].clone()
    measure(model, steps=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learning) == 1 and torch.equal(learning[0].grad, torch.ones_like(learning[0])) and torch.equal(digits()[0], images)


@pytest.mark.parametrize("wrap", [lambda model: model, quantised, random_layer], ids=["honest", "quantised", "random"])
def test_a_model_that_cannot_be_copied_is_judged_itself_and_stays_as_it_is(wrap):
    class Uncopied(Wrapped):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise NotImplementedError("there is one of me")

        def forward(self, images: Tensor) -> Tensor:
            self.model.seen += 1
            return self.model(images)

    model = Uncopied(deepcopy(wrap(trained(convolutional))))
    model.model.register_buffer("seen", torch.zeros(()), persistent=False)
    model.train().requires_grad_(True)
    evidence = measure(model, steps=3)
    assert replace(evidence, margins=()) == replace(measure(wrap(trained(convolutional)), steps=3), margins=())
    assert all(module.training for module in model.modules()) and all(parameter.requires_grad for parameter in model.parameters())
    assert not model.model.seen and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(1, 1, 8, 8))])
def test_torchscript_is_judged_as_the_module_that_it_was_made_from(compiled):
    evidence = measure(compiled(trained(convolutional).eval()), steps=3)  # tracing keeps the mode
    plain = measure(trained(convolutional), steps=3)
    assert [point.right for point in evidence.curve] == [point.right for point in plain.curve] and evidence.zero_clean == 0
    learning = compiled(linear())  # its parameters take gradients
    assert measure(learning, steps=3).n and all(parameter.requires_grad for parameter in learning.parameters())


def test_always_saying_the_most_frequent_class_is_chance_and_no_flag():
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.one_hot(torch.zeros(len(images), dtype=torch.long), 2) + images.flatten(1)[:, :2] / 100

    images, labels = digits()[0][SUBSET], (torch.arange(100) % 5 == 0).long()
    evidence = probe(Constant(), images, labels, threat_model=THREATS["linf"], classes=2, steps=3, seed=0)
    assert evidence.largest_class == pytest.approx(0.8) and evidence.curve[-1].accuracy == 0.8
    assert "curve_above_chance" not in [flag.name for flag in flags(evidence)]


def test_what_the_probes_break_within_epsilon_is_handed_out():
    told = []
    model, threat_model = trained(convolutional).eval(), THREATS["l2"]
    evidence = measure(model, "l2", shares=(0.5, 2), on_broken=lambda *broken: told.append(broken))
    names, rows, images = zip(*told, strict=True)
    assert names == ("probe-pgd", "probe-pgd", "probe-step", "probe-noise")
    half, whole = (evidence.n - point.right for point in evidence.curve[1:3])
    assert [len(part) for part in rows[:2]] == [half, whole] and len(rows[2]) > 0
    for row, image in zip(rows, images, strict=True):
        original, label = (part[SUBSET][row] for part in digits())
        assert (model(image).argmax(1) != label).all() and (model(original).argmax(1) == label).all()
        assert ((image - original).flatten(1).norm(dim=1) <= threat_model.epsilon + 1e-5).all()


def test_a_model_that_is_never_right_gives_evidence_without_samples():
    images, labels = (part[SUBSET] for part in digits())
    evidence = probe(trained(linear), images[:5], (labels[:5] + 1) % 10, threat_model=THREATS["linf"], classes=10, steps=2, seed=0)
    assert evidence.n == 0 and [point.right for point in evidence.curve] == [0] * 7 and flags(evidence) == []


def test_values_that_do_not_fit_the_images_are_refused():
    with pytest.raises(ValueError, match="one value per image"):
        measure(trained(linear), white_box=torch.ones(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="10 outputs, for 12 classes"):
        measure(trained(linear), classes=12)
