"""The training loop: one step equals the formulas, the selected epoch is kept, and the same seed gives the same bits."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advml import config
from advml.attacks.pgd import Adversary
from advml.core.device import Machine, generator_for
from advml.core.errors import Failure
from advml.data.augment import view
from advml.data.datasets import Dataset, Split
from advml.models.layers import DualBatchNorm
from advml.models.network import Network
from advml.recipes import REGIMES, SCHEMES
from advml.training.adversarial_steps import adversarial_training
from advml.training.checkpoint import Checkpoint
from advml.training.optimization import learning_rate
from advml.training.tasks import Classification, finetuning_task, pretraining_task
from advml.training.trainer import train


def configured(*overrides: str) -> config.Config:
    values = ["attack.steps=2", "views.contrastive={shift: 0.2, brightness: 0.3}", *overrides]
    return config.load(Path(__file__).parents[2] / "params.yaml", values)


CONFIG = configured()
CPU = Machine(torch.device("cpu"))
SEED = 5
# scheme, what trains, attacked: all phases that learn something
PHASES = {
    "SL st": ("SL", "pretrain", False),
    "SL at": ("SL", "pretrain", True),
    "CL st": ("CL", "pretrain", False),
    "CL at": ("CL", "pretrain", True),
    "SCL at": ("SCL", "pretrain", True),
    "CL ST": ("CL", "ST", False),
    "CL Partial-AT": ("CL", "Partial-AT", True),
    "CL Full-AT": ("CL", "Full-AT", True),
}


def settings(**changes: object) -> config.Phase:
    plain = {"optimizer": "adamw", "schedule": "cosine"}
    plain |= {"epochs": 2, "batch_size": 32, "learning_rate": 0.01, "weight_decay": 0.01, "gradient_clip": None, "keep": "best"}
    return config.Phase(**(plain | changes))


def make_task(phase: str, network: Network, dataset: Dataset, values: config.Phase):
    scheme, kind, _ = PHASES[phase]
    if kind == "pretrain":
        spec = getattr(CONFIG.views, SCHEMES[scheme].view)
        return pretraining_task(network, SCHEMES[scheme], values, spec=spec, temperature=CONFIG.temperature)
    return finetuning_task(network, REGIMES[kind], values, dataset.train, CPU)


class Unread:
    """A split that nobody may touch."""

    def __getattribute__(self, name: str) -> None:
        raise AssertionError(f"training has read the test split ({name})")

    def __len__(self) -> int:
        raise AssertionError("training has counted the test split")


@pytest.fixture
def small(dataset) -> Dataset:
    """Two batches of 32 to learn from, 16 images to select on; whatever trains on them shows that training never reads the test split."""
    train_split, validation = (Split(split.images[:n], split.labels[:n]) for split, n in ((dataset.train, 64), (dataset.validation, 16)))
    return replace(dataset, train=train_split, validation=validation, test=Unread())


@pytest.fixture
def fit(tmp_path, small, make_network) -> Callable[..., tuple[Network, list[dict[str, float]]]]:
    """fit("CL at", epochs=1) trains a small network; returns it with its history."""
    made = iter(range(1000))

    def run(
        phase: str, *, network=None, data=small, seed=SEED, configuration=CONFIG, checkpoint=None, machine=CPU, **changes: object
    ) -> tuple[Network, list[dict[str, float]]]:
        network = network or make_network()
        values = settings(**changes)
        adversary = adversarial_training(configuration.attack, configuration.threat_model, values) if PHASES[phase][2] else None
        checkpoint = checkpoint or Checkpoint(tmp_path / f"scratch{next(made)}", "same")
        task = make_task(phase, network, data, values)
        return network, list(train(task, data, values, adversary=adversary, seed=seed, machine=machine, checkpoint=checkpoint))

    return run


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the parts of a network (encoder, classifier, ...) that hold a changed tensor."""
    assert before.keys() == after.keys()
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


# One step, against a literal transcription of the formulas


def literal_contrastive(first: Tensor, second: Tensor, groups: list[int], t: float) -> Tensor:
    """Khosla et al. 2020, eq. 2: mean over the 2N anchors of -1/|P(i)| sum_p log(exp(z_i.z_p/t) / sum_{a != i} exp(z_i.z_a/t))."""
    z, group = torch.cat([first, second]).double(), [*groups, *groups]
    losses = []
    for i in range(len(z)):
        denominator = sum(torch.exp(z[i] @ z[a] / t) for a in range(len(z)) if a != i)
        positives = [p for p in range(len(z)) if p != i and group[p] == group[i]]
        losses.append(-sum(torch.log(torch.exp(z[i] @ z[p] / t) / denominator) for p in positives) / len(positives))
    return torch.stack(losses).mean()


def literal_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """-sum_k q_k log p_k, where q is (1 - s) at the label plus s / K everywhere."""
    p = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    q = torch.full_like(p, smoothing / p.shape[1])
    q[range(len(labels)), labels] += 1 - smoothing
    return -(q * p.log()).sum(1).mean()


def literal_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Zhang et al. 2019, eq. 5: sum_k p_k log(p_k / q_k), p from the first logits."""
    p, q = (logits.double().exp() / logits.double().exp().sum(1, keepdim=True) for logits in (first, second))
    return (p * (p / q).log()).sum(1).mean()


def literal_pgd(loss: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator, *, epsilon: float, steps: int) -> Tensor:
    """Steps of 2.5 epsilon / steps along the sign of the gradient, from a uniformly random start, inside ball and box."""
    attacked = (x + epsilon * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(attacked), attacked)
        attacked = attacked.detach() + 2.5 * epsilon / steps * gradient.sign()
        attacked = torch.minimum(torch.maximum(attacked, x - epsilon), x + epsilon).clamp(0, 1)
    return attacked


@dataclass
class Literal:
    """The losses of one step of every phase, written down from the formulas."""

    network: Network
    labels: Tensor
    groups: list[int] | None = None
    smoothing: float = 0.0
    modes: tuple[bool, bool] = (True, False)  # train mode while learning, while attacked
    trades: bool = False
    epsilon: float = CONFIG.threat_model.epsilon
    steps: int = 2

    def pair(self, first: Tensor, second: Tensor) -> Tensor:
        return literal_contrastive(*self.network.embed(torch.cat([first, second])).chunk(2), self.groups, CONFIG.temperature)

    def classify(self, x: Tensor, smoothing: float) -> Tensor:
        return literal_cross_entropy(self.network(x), self.labels, smoothing)

    def clean(self, views: list[Tensor]) -> Tensor:
        self.network.train(self.modes[0])
        return self.pair(*views) if self.groups else self.classify(views[0], self.smoothing)

    def adversarial(self, x: Tensor, generator: torch.Generator) -> Tensor:
        self.network.train(self.modes[1])
        fixed = self.network(x).detach() if self.trades else None
        loss = lambda d: self.pair(x, d) if self.groups else self.classify(d, 0.0)  # noqa: E731
        if self.trades:
            loss = lambda d: literal_divergence(fixed, self.network(d))  # noqa: E731
        attacked = literal_pgd(loss, x, generator, epsilon=self.epsilon, steps=self.steps)
        self.network.train(self.modes[0])
        if self.trades:
            return literal_divergence(self.network(x), self.network(attacked))
        return self.pair(x, attacked) if self.groups else self.classify(attacked, self.smoothing)


STEPS = {
    **{name: (name, {}) for name in PHASES},
    "weight of the attacked term": ("CL at", {"adversarial_weight": 0.3}),
    "gradient clipped": ("SL at", {"gradient_clip": 0.05}),
    "labels smoothed": ("SL at", {"label_smoothing": 0.2}),
    "head with smoothed labels": ("CL Partial-AT", {"label_smoothing": 0.2, "adversarial_weight": 2.0}),
    "trades, pretraining": ("SL at", {"loss": "trades", "adversarial_weight": 6.0, "label_smoothing": 0.1}),
    "trades, head": ("CL Partial-AT", {"loss": "trades", "adversarial_weight": 6.0}),
    "trades, encoder and head": ("CL Full-AT", {"loss": "trades", "adversarial_weight": 6.0}),
    "a radius of its own": ("CL at", {"epsilon": 0.05}),
    "steps of its own": ("SL at", {"attack_steps": 3}),
    "layers that learn less, sgd": ("CL Full-AT", {"layer_decay": 0.5}),
    "frozen statistics": ("CL Full-AT", {"frozen_statistics": True}),
    "all at once": ("CL Full-AT", {"loss": "trades", "layer_decay": 0.7, "frozen_statistics": True, "epsilon": 0.1, "attack_steps": 3}),
}
# Of test_resnet: how far below the heads a parameter lies.
DEPTHS = {"classifier": 0, "projection_head": 0, "layer4": 1, "layer3": 2, "layer2": 3, "layer1": 4, "conv1": 5, "bn1": 5}


def depth(name: str) -> int:
    """`encoder.layer3.0.conv1.weight` -> 2"""
    return DEPTHS[name.removeprefix("encoder.").split(".")[0]]


@pytest.mark.parametrize(("phase", "changes"), STEPS.values(), ids=STEPS)
def test_one_step_equals_the_formulas(fit, make_network, dataset, phase, changes):
    scheme, kind, attacked = PHASES[phase]
    data = replace(dataset, train=Split(dataset.train.images[:16], dataset.train.labels[:16]))
    values = {"epochs": 1, "batch_size": 16, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "schedule": "constant"}
    ours, (record,) = fit(phase, data=data, **values, **changes)

    network, generator = make_network(), generator_for("train", SEED, 1)
    order = torch.randperm(16, generator=generator)
    x, labels = data.train.images[order].float() / 255, data.train.labels[order]
    pretrains, head_only = kind == "pretrain", kind in ("ST", "Partial-AT")
    groups = {"CL": list(range(16)), "SCL": labels.tolist()}.get(scheme) if pretrains else None
    literal = Literal(
        network,
        labels,
        groups,
        changes.get("label_smoothing", 0.0),
        modes=(not head_only and not changes.get("frozen_statistics"), False),
        trades=changes.get("loss") == "trades",
        epsilon=changes.get("epsilon", CONFIG.threat_model.epsilon),
        steps=changes.get("attack_steps", 2),
    )
    spec = {"SL": CONFIG.views.supervised}.get(scheme, CONFIG.views.contrastive)
    clean = literal.clean([view(x, spec, generator=generator) for _ in range(2 if groups else 1)] if pretrains else [x])
    adversarial = literal.adversarial(x, generator) if attacked else torch.zeros(())
    head = network.projection_head if groups else network.classifier
    learners = [*head.parameters(), *([] if head_only else network.encoder.parameters())]
    gradients = torch.autograd.grad(clean + changes.get("adversarial_weight", 1.0) * adversarial, learners)
    size = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    shrink = min(1.0, changes.get("gradient_clip", math.inf) / size)
    assert "gradient_clip" not in changes or shrink < 0.5  # else nothing is tested
    names = {parameter: name for name, parameter in network.named_parameters()}
    for parameter, gradient in zip(learners, gradients, strict=True):
        rate = 0.1 * changes.get("layer_decay", 1.0) ** depth(names[parameter])
        parameter.data -= rate * shrink * (gradient + 0.9 * gradient)  # the first step of SGD with Nesterov momentum 0.9

    assert record["train/loss"] == pytest.approx(clean.item(), rel=1e-4)
    assert record.get("train/adversarial_loss", 0.0) == pytest.approx(adversarial.item(), rel=1e-4)
    assert ("train/adversarial_loss" in record) == attacked
    start, expected, actual = (dict(one.named_parameters()) for one in (make_network(), network, ours))
    moved = math.sqrt(sum((expected[key] - start[key]).square().sum().item() for key in start))
    apart = math.sqrt(sum((expected[key] - actual[key]).square().sum().item() for key in start))
    assert moved > 1e-3 and apart < 1e-3 * moved


# Who changes


WHO = {  # phase -> what of a network changes, weights and statistics of batch norms
    "CL ST": {"classifier"},
    "CL Partial-AT": {"classifier"},
    "CL Full-AT": {"encoder", "classifier"},
    "SL at": {"encoder", "classifier"},
    "CL at": {"encoder", "projection_head"},
    "SCL at": {"encoder", "projection_head"},
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("phase", "parts"), WHO.items(), ids=WHO)
def test_what_a_phase_changes_whatever_mode_its_attack_asks_for(fit, make_network, phase, parts, mode):
    network, _ = fit(phase, configuration=configured(f"attack.batch_norm={mode}"), epochs=1)
    assert changed(weights(make_network()), weights(network)) == parts


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dual", [False, True])
def test_frozen_statistics_stay_and_everything_else_learns(fit, make_network, mode, dual):
    configuration = configured(f"attack.batch_norm={mode}")
    network, _ = fit(
        "CL Full-AT", network=make_network(dual_batch_norm=dual), configuration=configuration, epochs=1, frozen_statistics=True
    )
    before, after = weights(make_network(dual_batch_norm=dual)), weights(network)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith(statistics))
    norms = [name for name, layer in network.encoder.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert not any(torch.equal(before[f"encoder.{name}.bias"], after[f"encoder.{name}.bias"]) for name in norms if name.startswith("bn1"))
    assert {"encoder", "classifier"} == changed(before, after)


# The radius that rises


@pytest.fixture
def radii(monkeypatch) -> list[tuple[float, float, bool]]:
    """(radius, step size, whether it trains) of every attack from here on."""
    seen, attack = [], Adversary.attack

    def watch(adversary: Adversary, network: Network, *rest: object, **options: object) -> Tensor:
        seen.append((adversary.threat_model.epsilon, adversary.step_size, network.training))
        return attack(adversary, network, *rest, **options)

    monkeypatch.setattr(Adversary, "attack", watch)
    return seen


@pytest.mark.parametrize("phase", ["SL at", "CL at", "CL Full-AT"])
def test_the_radius_rises_with_its_step_and_validation_attacks_at_the_whole(fit, radii, phase):
    """64 images in batches of 16, 2 epochs: 8 steps, the first 4 of them on the way."""
    fit(phase, epochs=2, batch_size=16, epsilon_warmup=0.5, epsilon=0.2)
    shares = [epsilon / 0.2 for epsilon, _, trains in radii if trains]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert all(step == pytest.approx(1.25 * epsilon) for epsilon, step, _ in radii)
    assert {epsilon for epsilon, _, trains in radii if not trains} == {0.2}


def test_the_score_of_validation_does_not_depend_on_the_loss(fit, small, monkeypatch):
    """Else trials of a search would be scored by attacks of different strength."""
    objectives = []
    monkeypatch.setattr(Classification, "objective", lambda task, images, labels: objectives.append(1) or task.term.objective)
    monkeypatch.setattr(Adversary, "attack", lambda adversary, network, objective, images, *, generator: objective() and images)
    fit("CL Full-AT", loss="trades", epochs=1)
    assert len(objectives) == 1  # of the one batch of validation; training takes another one


# Batch norm while attacked: batches that moved the statistics, in one epoch of two batches


def batch_norms(network: Network) -> set[int]:
    return {int(module.num_batches_tracked) for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}


@pytest.mark.parametrize(
    ("phase", "mode", "per_batch"),
    [
        ("SL at", "eval", 2),  # the clean batch and the attacked one
        ("CL at", "eval", 2),
        ("CL Full-AT", "eval", 2),
        ("SL at", "train", 2 + 2),  # and every step of the attack
        ("CL Full-AT", "train", 2 + 2),
        ("CL at", "train", 2 + 2 + 1),  # and the clean embedding
    ],
)
def test_an_attack_moves_the_statistics_only_in_train_mode(fit, phase, mode, per_batch):
    configuration = configured(f"attack.batch_norm={mode}")
    network, _ = fit(phase, configuration=configuration, epochs=1)
    assert batch_norms(network) == {2 * per_batch}


@pytest.mark.parametrize("phase", ["SL at", "CL at", "CL Full-AT"])
def test_dual_statistics_count_clean_and_attacked_batches_apart(fit, make_network, phase):
    network, _ = fit(phase, network=make_network(dual_batch_norm=True), epochs=1)
    layers = [module for module in network.modules() if isinstance(module, DualBatchNorm)]
    assert {int(layer.clean.num_batches_tracked) for layer in layers} == {2}
    assert {int(layer.adversarial.num_batches_tracked) for layer in layers} == {2}
    assert not torch.equal(layers[0].clean.running_mean, layers[0].adversarial.running_mean)


# Selection


class Scripted(Classification):
    """Its validation scores are given in advance, (clean, adversarial) per epoch."""

    def __init__(self, network: Network, scores: list[tuple[float, float]]) -> None:
        super().__init__(network)
        self.scores, self.epoch = scores, -1

    def clean_score(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        self.epoch += 1
        return torch.full((len(labels),), self.scores[self.epoch][0])

    def adversarial_score(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        return torch.full((len(labels),), self.scores[self.epoch][1])


class ScriptedLoss(Scripted):
    metric, larger_is_better, perturbed = "loss", False, (1,)


SELECTIONS = {
    "a bad last epoch": (Scripted, "best", [(0.1, 0.1), (0.8, 0.6), (0.2, 0.1)], 2),
    "the last, on request": (Scripted, "last", [(0.1, 0.1), (0.8, 0.6), (0.2, 0.1)], 3),
    "the adversarial score decides": (Scripted, "best", [(0.9, 0.2), (0.5, 0.4), (0.9, 0.3)], 2),
    "of equals, the later": (Scripted, "best", [(0.5, 0.4), (0.5, 0.4), (0.9, 0.3)], 2),
    "small losses are good": (ScriptedLoss, "best", [(5.0, 5.0), (2.0, 1.0), (1.0, 2.0)], 2),
}


@pytest.mark.parametrize(("kind", "keep", "scores", "kept"), SELECTIONS.values(), ids=SELECTIONS)
def test_the_selected_epoch_is_kept(tmp_path, small, make_network, kind, keep, scores, kept):
    values = settings(epochs=3, keep=keep)
    checkpoint = Checkpoint(tmp_path, "x")
    task = kind(make_network(), scores)
    of_epoch = []
    for _ in train(
        task,
        small,
        values,
        adversary=adversarial_training(CONFIG.attack, CONFIG.threat_model),
        seed=SEED,
        machine=CPU,
        checkpoint=checkpoint,
    ):
        of_epoch.append(weights(task.network))
    final = weights(task.network)
    assert [not changed(one, final) for one in of_epoch] == [epoch == kept for epoch in (1, 2, 3)]
    assert checkpoint.load().best_epoch == kept


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("kind", [Scripted, ScriptedLoss])
def test_a_score_that_is_not_finite_ends_the_training(tmp_path, small, make_network, kind, keep):
    task, checkpoint = kind(make_network(), [(0.5, 0.4), (0.9, math.nan), (0.1, 0.1)]), Checkpoint(tmp_path, "x")
    epochs = train(
        task,
        small,
        settings(epochs=3, keep=keep),
        adversary=adversarial_training(CONFIG.attack, CONFIG.threat_model),
        seed=SEED,
        machine=CPU,
        checkpoint=checkpoint,
    )
    assert next(epochs)["epoch"] == 1
    with pytest.raises(Failure, match=rf"^validation/adversarial_{kind.metric} .*epoch 2"):
        next(epochs)
    assert checkpoint.load().epoch == 1


def test_without_an_adversary_the_clean_score_decides(tmp_path, small, make_network):
    task = Scripted(make_network(), [(0.5, 9.0), (0.9, 0.0), (0.7, 9.0)])
    checkpoint = Checkpoint(tmp_path, "x")
    history = list(train(task, small, settings(epochs=3), adversary=None, seed=SEED, machine=CPU, checkpoint=checkpoint))
    assert checkpoint.load().best_epoch == 2 and "validation/adversarial_accuracy" not in history[0]


def test_training_never_learns_from_validation(fit, small):
    """The weights after one epoch do not depend on validation's images; the score does."""
    other = replace(small, validation=Split(255 - small.validation.images, small.validation.labels))
    ours, (record,) = fit("CL st", epochs=1)
    theirs, (record_of_other,) = fit("CL st", epochs=1, data=other)
    assert not changed(weights(ours), weights(theirs))
    assert record["train/loss"] == record_of_other["train/loss"] and record["validation/loss"] != record_of_other["validation/loss"]


# Randomness


@pytest.mark.parametrize("phase", ["SL at", "SCL at", "CL Partial-AT"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(fit, phase):
    torch.manual_seed(1)
    first, history = fit(phase, epochs=1)
    torch.manual_seed(2)  # nothing depends on the global state
    second, history_again = fit(phase, epochs=1)
    assert not changed(weights(first), weights(second)) and history == history_again
    third, _ = fit(phase, seed=SEED + 1, epochs=1)
    assert changed(weights(first), weights(third))


def test_training_leaves_the_global_random_state_as_it_was(fit, monkeypatch):
    """That of the CPU, and those of GPUs, which `torch.manual_seed` would seed anew wherever the training runs."""
    torch.manual_seed(3)
    before, seeded = torch.get_rng_state(), []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeded.append)
    fit("CL at", epochs=1)
    assert torch.equal(torch.get_rng_state(), before) and not seeded


def test_every_epoch_has_its_own_order_and_views_and_the_same_validation(fit):
    """With a vanishing learning rate only the draws tell the epochs apart."""
    _, history = fit("CL at", epochs=2, learning_rate=1e-30, weight_decay=0.0)
    assert history[0]["train/loss"] != history[1]["train/loss"]
    # Batch-norm statistics move on; without them the validation loss would be the very same number.
    assert history[0]["validation/loss"] == pytest.approx(history[1]["validation/loss"], rel=0.2)
    _, history = fit("CL Partial-AT", epochs=2, learning_rate=1e-30, weight_decay=0.0)
    assert history[0]["validation/adversarial_accuracy"] == history[1]["validation/adversarial_accuracy"]


def test_every_image_is_seen_at_most_once_per_epoch(tmp_path, dataset, make_network):
    """100 images in batches of 32: 96 of them, other ones in every epoch."""

    class Watching(Classification):
        def clean_loss(self, views: Tensor, labels: Tensor, index: Tensor) -> Tensor:
            seen.extend(index.tolist())
            assert torch.equal(views, data.train.images[index].float() / 255) and torch.equal(labels, data.train.labels[index])
            return super().clean_loss(views, labels, index)

    seen: list[int] = []
    extra = Split(torch.cat([dataset.train.images, dataset.test.images[:4]]), torch.cat([dataset.train.labels, dataset.test.labels[:4]]))
    data = replace(dataset, train=extra)
    task = Watching(make_network())
    list(train(task, data, settings(epochs=2), adversary=None, seed=SEED, machine=CPU, checkpoint=Checkpoint(tmp_path, "x")))
    first, second = seen[:96], seen[96:]
    assert len(set(first)) == len(set(second)) == 96 and first != second and set(first) != set(second)


# Going on


RESUMED = {
    "CL at": ("CL at", {"epochs": 3}, {}),
    "CL Partial-AT": ("CL Partial-AT", {}, {}),
    "adam": ("SL st", {"optimizer": "adam"}, {}),
    "keep last": ("SL st", {"keep": "last"}, {}),
    "dropout": ("SL st", {}, {"options": {"drop_rate": 0.5}}),
    "dual batch norm": ("SL at", {}, {"dual_batch_norm": True}),
    "one batch larger than the data": ("SL st", {"batch_size": 200}, {}),
    "options of a search": (
        "CL Full-AT",
        {"loss": "trades", "layer_decay": 0.7, "frozen_statistics": True, "epsilon": 0.1, "epsilon_warmup": 0.6, "attack_steps": 3},
        {},
    ),
    "layers that learn less, sgd": ("CL at", {"layer_decay": 0.7, "epsilon_warmup": 0.9, "optimizer": "sgd"}, {}),
}


@pytest.mark.parametrize(("phase", "changes", "architecture"), RESUMED.values(), ids=RESUMED)
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, fit, small, make_network, phase, changes, architecture):
    """Stopped after every epoch, each time in the middle of the next one, and continued by a fresh network and optimiser."""
    changes = {"epochs": 2, "attack_steps": 1, **changes}
    epochs = changes["epochs"]
    whole, history = fit(phase, network=make_network(**architecture), **changes)

    values = settings(**changes)
    for finished in range(epochs):
        torch.manual_seed(finished)  # the global state is another one in every process
        network = make_network(**architecture)
        begun = train(
            make_task(phase, network, small, values),
            small,
            values,
            adversary=adversarial_training(CONFIG.attack, CONFIG.threat_model, values) if PHASES[phase][2] else None,
            seed=SEED,
            machine=CPU,
            checkpoint=Checkpoint(tmp_path / "scratch", "x"),
            on_batch=interrupt_in(finished + 2),
        )
        with pytest.raises(Interrupted) if finished < epochs - 1 else contextlib.nullcontext():
            assert [record["epoch"] for record in begun] == list(range(1, epochs + 1))
    assert not changed(weights(whole), weights(network))
    _, again = fit(phase, network=make_network(**architecture), checkpoint=Checkpoint(tmp_path / "scratch", "x"), **changes)
    assert again == history


class Interrupted(BaseException):
    pass


def interrupt_in(wanted: int) -> Callable[[int, int, float], None]:
    def on_batch(epoch: int, done: int, loss: float) -> None:
        if epoch == wanted:
            raise Interrupted

    return on_batch


def test_a_finished_training_is_told_again_without_a_step(fit, tmp_path, make_network):
    first, history = fit("SL at", checkpoint=Checkpoint(tmp_path / "scratch", "x"))
    network = make_network(seed=9)  # whatever its weights are
    steps = []
    network.encoder.register_forward_hook(lambda *_: steps.append(1))
    second, again = fit("SL at", network=network, checkpoint=Checkpoint(tmp_path / "scratch", "x"))
    assert again == history and not changed(weights(first), weights(second)) and not steps


# Neutral values


@pytest.mark.parametrize("phase", ["SL at", "CL at", "CL Partial-AT", "CL Full-AT"])
def test_options_that_say_what_holds_anyway_change_no_bit(fit, phase):
    plain, history = fit(phase, epochs=1)
    spelled, again = fit(phase, epochs=1, epsilon=CONFIG.threat_model.epsilon, attack_steps=CONFIG.attack.steps, epsilon_warmup=1e-9)
    assert not changed(weights(plain), weights(spelled)) and history == again


# Steps, rates, failures


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.normalize = self.encoder = nn.Identity()


class Slope:
    """Its loss is w: every gradient is 1, so that Adam moves w by the learning rate."""

    metric, larger_is_better, perturbed = "loss", False, (1,)

    def __init__(self) -> None:
        self.network, self.path = Weight(), []

    def learners(self) -> list[nn.Parameter]:
        return [self.network.w]

    def train_mode(self) -> None:
        pass

    def views(self, images: Tensor, *, generator: torch.Generator, strength: float = 1.0) -> Tensor:
        return images

    def clean_loss(self, views: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        self.path.append(self.network.w.item())
        return self.network.w.expand(len(labels))

    def clean_score(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        return torch.zeros(len(labels))


@pytest.mark.parametrize(("schedule", "warmup"), [("constant", 0.0), ("cosine", 0.25), ("onecycle", 0.0)])
def test_every_step_has_its_own_learning_rate(tmp_path, dataset, schedule, warmup):
    """96 images, batches of 16, 4 epochs: 24 steps along one schedule."""
    values = settings(
        epochs=4, batch_size=16, optimizer="adam", learning_rate=0.5, weight_decay=0.0, schedule=schedule, warmup=warmup, keep="last"
    )
    task = Slope()
    history = list(train(task, dataset, values, adversary=None, seed=SEED, machine=CPU, checkpoint=Checkpoint(tmp_path, "x")))
    path = [*task.path, task.network.w.item()]
    rates = [learning_rate(values, step=step, steps=24) for step in range(24)]
    assert [before - after for before, after in itertools.pairwise(path)] == pytest.approx(rates, abs=1e-5)
    assert [record["learning_rate"] for record in history] == pytest.approx(rates[5::6])


def test_a_loss_that_is_not_finite_stops_with_the_knobs_to_turn_and_its_epoch_is_not_saved(tmp_path, fit):
    checkpoint = Checkpoint(tmp_path / "scratch", "x")
    with pytest.raises(Failure) as stopped:
        fit("SL at", learning_rate=1e30, optimizer="sgd", schedule="constant", checkpoint=checkpoint)
    assert checkpoint.load() is None
    line = str(stopped.value)
    assert "epoch 1" in line and "learning rate" in line and "1e+30" in line and "gradient_clip" in line and "\n" not in line


BROKEN = {  # what is broken before the training, and what the message names; never the learning rate
    "weights": (lambda network: network.classifier.weight.data[0, 0].fill_(math.inf), r"initial weight classifier.weight"),
    "loss": (lambda network: network.classifier.weight.data.mul_(1e38), r"train/loss .* model.options"),
    "gradient": (
        lambda network: network.classifier.bias.register_hook(lambda gradient: gradient * math.nan),
        r"the gradient of classifier.bias .* model.options",
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("breaks", "said"), BROKEN.values(), ids=BROKEN)
def test_what_is_not_finite_before_the_first_step_is_not_blamed_on_the_learning_rate(
    tmp_path, dataset, make_network, breaks, said, precision
):
    task, machine = Classification(make_network()), Machine(torch.device("cpu"), precision)
    breaks(task.network)
    with pytest.raises(Failure, match=said) as stopped:
        next(train(task, dataset, settings(), adversary=None, seed=SEED, machine=machine, checkpoint=Checkpoint(tmp_path, "x")))
    line = str(stopped.value)
    assert "lower the learning rate" not in line and ("fp32" in line) == (precision == "bf16" and "model.options, a" in line)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_weights_that_the_last_step_has_broken_are_not_taken_for_good(fit, keep):
    """One step: its loss was finite, and predictions may be counted whatever the logits are."""
    with pytest.raises(Failure, match=r"epoch 1; .*1e\+30"):
        fit("SL at", learning_rate=1e30, optimizer="sgd", schedule="constant", epochs=1, batch_size=96, keep=keep)


def test_every_batch_is_told_and_their_mean_is_recorded(tmp_path, dataset, make_network):
    told = []
    task = Classification(make_network())
    history = list(
        train(
            task,
            dataset,
            settings(),
            adversary=None,
            seed=SEED,
            machine=CPU,
            checkpoint=Checkpoint(tmp_path, "x"),
            on_batch=lambda epoch, done, loss: told.append((epoch, done, float(loss))),
        )
    )
    assert [(epoch, done) for epoch, done, _ in told] == [(epoch, done) for epoch in (1, 2) for done in (1, 2, 3)]
    means = [sum(loss for _, _, loss in told[first : first + 3]) / 3 for first in (0, 3)]
    assert [record["train/loss"] for record in history] == pytest.approx(means)


def test_records_hold_exactly_the_documented_names(fit):
    _, (record, _) = fit("CL at")
    assert set(record) == {
        *("epoch", "learning_rate", "train/loss", "train/adversarial_loss", "train/gradient_steps"),
        *("validation/loss", "validation/adversarial_loss"),
    }
    _, (record, _) = fit("CL ST")
    assert set(record) == {"epoch", "learning_rate", "train/loss", "train/gradient_steps", "validation/accuracy"}


def test_training_learns(fit):
    """Adversarial training on easy patterns: nearly everything right, and most of it under a small attack."""
    configuration = configured("threat_model.epsilon=0.05")
    _, history = fit("SL at", configuration=configuration, epochs=5, batch_size=8, learning_rate=5e-3, schedule="onecycle")
    assert history[-1]["validation/accuracy"] > 0.9 and history[-1]["validation/adversarial_accuracy"] > 0.6
    assert history[-1]["train/loss"] < 0.7 * history[0]["train/loss"]


@pytest.mark.parametrize("phase", ["SL at", "CL at", "CL Partial-AT", "CL Full-AT"])
def test_training_in_bf16_works_and_keeps_the_weights_in_fp32(fit, phase):
    network, history = fit(phase, machine=Machine(torch.device("cpu"), "bf16"), epochs=1)
    assert all(math.isfinite(value) for value in history[0].values())
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32, torch.int64}
