"""Free and fast adversarial training: against slow transcriptions, killed and resumed, and ended when they overfit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transcriptions import supcon

from advml import config
from advml.attacks.pgd import Adversary
from advml.attacks.threat_model import ThreatModel
from advml.core.device import Machine, generator_for
from advml.core.errors import Failure, UserError
from advml.data.augment import view
from advml.data.datasets import Dataset, Split
from advml.models.network import Network
from advml.recipes import REGIMES, SCHEMES
from advml.training.adversarial_steps import COLLAPSED, KINDS, WITHSTOOD, AdversarialTraining, adversarial_training, has_collapsed
from advml.training.checkpoint import Checkpoint
from advml.training.tasks import Classification, finetuning_task, pretraining_task
from advml.training.trainer import train

PARAMS = Path(__file__).parents[2] / "params.yaml"
CONFIG = config.load(PARAMS, ["views.contrastive={shift: 0.2, brightness: 0.3}", "attack.steps=3", "threat_model.epsilon=0.1"])
CPU, SEED, EPSILON, REPLAYS = Machine(torch.device("cpu")), 5, 0.1, 3
PRETRAIN, FULL = "pretraining", "Full-AT"


def settings(**changes: object) -> config.Phase:
    plain = {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.0001, "weight_decay": 0.0}
    return config.Phase(**(plain | {"epochs": 2, "batch_size": 16} | changes))


@pytest.fixture
def small(dataset) -> Dataset:
    """Two batches of 16 to learn from, 16 images to select on."""
    return replace(dataset, train=Split(dataset.train.images[:32], dataset.train.labels[:32]), validation=Split(*few(dataset.validation)))


def few(split: Split) -> tuple[Tensor, Tensor]:
    return split.images[:16], split.labels[:16]


def make_task(what: str, scheme: str, network: Network, dataset: Dataset, phase: config.Phase):
    if what == PRETRAIN:
        row = SCHEMES[scheme]
        return pretraining_task(network, row, phase, spec=getattr(CONFIG.views, row.view), temperature=CONFIG.temperature)
    return finetuning_task(network, REGIMES[what], phase, dataset.train, CPU)


def fit(what: str, scheme: str, network: Network, dataset: Dataset, phase: config.Phase, checkpoint: Checkpoint, **options):
    """All records of a training."""
    task = make_task(what, scheme, network, dataset, phase)
    adversary = adversarial_training(CONFIG.attack, CONFIG.threat_model, phase)
    return list(train(task, dataset, phase, adversary=adversary, seed=SEED, machine=CPU, checkpoint=checkpoint, **options))


# Against transcriptions


def literal_loss(scheme: str, network: Network, views: list[Tensor], labels: Tensor) -> Tensor:
    """CE(v); Khosla et al. 2020, eq. 2, over all anchors; Tong et al. 2023, eq. 4."""
    if scheme == "SL":
        return F.cross_entropy(network(views[0]), labels)
    z = network.embed(torch.cat(views)).double().unflatten(0, (len(views), -1))
    if scheme == "EMP":
        mean, (_, count, width) = z.mean(0), z.shape
        agreement = torch.stack([F.cosine_similarity(crop, mean).mean() for crop in z]).mean()
        rates = [-0.5 * torch.logdet(torch.eye(width) + width / (count * 0.2) * crop.T @ crop) for crop in z]
        return -200 * agreement + torch.stack(rates).mean()
    groups = (torch.arange(len(labels)) if scheme == "CL" else labels).repeat(len(views))
    return supcon(z.flatten(0, 1), groups.tolist(), CONFIG.temperature).mean()


def literal_free(scheme: str, network: Network, dataset: Dataset, *, views: int, perturbed: int, augment: bool) -> Tensor:
    """Shafahi et al. 2019, alg. 1, with SGD and Nesterov momentum 0.9 at rate 0.0001; returns d."""
    head = network.classifier if scheme == "SL" else network.projection_head
    learners = [*network.encoder.parameters(), *head.parameters()]
    velocity = [torch.zeros_like(one) for one in learners]
    d = torch.zeros(perturbed, 16, 1, 8, 8)
    network.train()
    generator = generator_for("train", SEED, 1)
    for index in torch.randperm(32, generator=generator).split(16):
        x, labels = dataset.train.images[index].float() / 255, dataset.train.labels[index]
        spec = getattr(CONFIG.views, SCHEMES[scheme].view)
        seen = [view(x, spec, generator=generator) if augment else x for _ in range(views)]
        plain = torch.stack(seen[-perturbed:])
        for _ in range(REPLAYS):
            attacked = (plain + d).clamp(0, 1).requires_grad_()
            loss = literal_loss(scheme, network, [*seen[:-perturbed], *attacked], labels)
            *gradients, g = torch.autograd.grad(loss, [*learners, attacked])
            for one, gradient, v in zip(learners, gradients, velocity, strict=True):
                v.mul_(0.9).add_(gradient)
                one.data -= 0.0001 * (gradient + 0.9 * v)
            d = (attacked.detach() + EPSILON * g.sign() - plain).clamp(-EPSILON, EPSILON)
            d = (plain + d).clamp(0, 1) - plain
    return d


FREE = {
    "SL": (PRETRAIN, "SL", {}, {"views": 1, "perturbed": 1}),
    "CL": (PRETRAIN, "CL", {}, {"views": 2, "perturbed": 1}),
    "SCL": (PRETRAIN, "SCL", {}, {"views": 2, "perturbed": 1}),
    "EMP-SSL, four crops": (PRETRAIN, "EMP", {"views": 4}, {"views": 4, "perturbed": 4}),
    "CL, both views": (PRETRAIN, "CL", {"attacked": "views"}, {"views": 2, "perturbed": 2}),
    "Full-AT": (FULL, "SL", {}, {"views": 1, "perturbed": 1}),
}


@pytest.mark.parametrize(("what", "scheme", "changes", "views"), FREE.values(), ids=FREE)
def test_free_training_equals_its_transcription(tmp_path, small, make_network, what, scheme, changes, views):
    """Three epochs in one pass of two batches, three replays each. Small steps: signs of tiny gradients soon part two computations."""
    checkpoint, phase = Checkpoint(tmp_path, "x"), settings(epochs=3, attack_kind="free", keep="last", **changes)
    ours = make_network()
    history = fit(what, scheme, ours, small, phase, checkpoint)
    theirs, start = make_network(), dict(make_network().named_parameters())
    d = literal_free(scheme, theirs, small, augment=what == PRETRAIN, **views)
    assert [record["epoch"] for record in history] == [1]
    assert all("train/adversarial_loss" not in record for record in history)
    expected, actual = (dict(network.named_parameters()) for network in (theirs, ours))
    moved = sum((expected[key] - start[key]).square().sum() for key in start).sqrt()
    apart = sum((expected[key] - actual[key]).square().sum() for key in start).sqrt()
    assert moved > 1e-4 and apart < 0.05 * moved
    carried = checkpoint.load().carried["perturbation"].unflatten(0, (-1, 16))
    assert carried.abs().max() <= EPSILON + 1e-6 and (carried - d).abs().gt(1e-3).float().mean() < 0.05


def test_fast_training_takes_one_step_of_125_hundredths_of_the_radius_and_validates_by_pgd(tmp_path, small, make_network, monkeypatch):
    seen, attack = [], Adversary.attack

    def watch(adversary: Adversary, network: Network, *rest: object, **options: object) -> Tensor:
        seen.append((adversary, network.training))
        return attack(adversary, network, *rest, **options)

    monkeypatch.setattr(Adversary, "attack", watch)
    fit(PRETRAIN, "SCL", make_network(), small, settings(epochs=1, attack_kind="fast"), Checkpoint(tmp_path, "x"))
    ball = ThreatModel("linf", EPSILON)
    one_step = Adversary(ball, steps=1, step_size=pytest.approx(0.125), random_start=True, keep="last")
    five_steps = Adversary(ball, steps=5, step_size=pytest.approx(0.05), random_start=True, keep="last")
    assert [one for one, trains in seen if trains] == [one_step, one_step] and [one for one, trains in seen if not trains] == [five_steps]


def test_epochs_are_divided_by_the_replays_and_an_explicit_step_is_taken():
    attack, threat = config.load(PARAMS, ["attack.kind=free", "attack.steps=3", "attack.step_size=0.01"]).attack, CONFIG.threat_model
    made = adversarial_training(attack, threat, settings())
    assert (made.replays, made.training.step_size, made.validation.step_size) == (3, 0.01, pytest.approx(0.05))
    assert [made.passes(epochs) for epochs in (1, 3, 4, 500)] == [1, 1, 2, 167]
    own = adversarial_training(attack, threat, settings(attack_kind="pgd", attack_steps=7, epsilon=0.2))
    assert own.training is own.validation and (own.training.steps, own.training.threat_model.epsilon) == (7, 0.2) and own.passes(500) == 500
    assert set(KINDS) == set(config.TrainAttack.model_fields["kind"].annotation.__args__)


# Killed


class Killed(BaseException):
    pass


def test_free_training_killed_in_every_pass_ends_with_the_same_bits(tmp_path, small, make_network):
    """Seven passes, killed in the middle of each but the first; the perturbation goes on where it was."""
    phase = settings(epochs=14, attack_kind="free", attack_steps=2, optimizer="adamw", epsilon_warmup=0.5, average="ema")
    whole = make_network()
    history = fit(PRETRAIN, "CL", whole, small, phase, Checkpoint(tmp_path / "whole", "x"))

    def kill_in(epoch: int) -> Callable[[int, int, float], None]:
        def on_batch(at: int, done: int, loss: float) -> None:
            if at == epoch and done == 1:
                raise Killed

        return on_batch

    killed = Checkpoint(tmp_path / "killed", "x")
    for epoch in range(2, 8):
        with pytest.raises(Killed):
            fit(PRETRAIN, "CL", make_network(), small, phase, killed, on_batch=kill_in(epoch))
    resumed = make_network()
    assert fit(PRETRAIN, "CL", resumed, small, phase, killed) == history and len(history) == 7
    both = (whole.state_dict(), resumed.state_dict())
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


# The guard


@pytest.mark.parametrize(
    ("shares", "images", "collapsed"),
    [
        ([0.6, 0.7, 0.0], 100, True),
        ([0.6, 0.7, 0.16], 100, True),
        ([0.6, 0.7, 0.19], 100, False),
        ([0.7, 0.1, 0.1], 100, True),
        ([0.306, 0.144], 180, False),  # the second epoch of a training that ends well
        ([0.056, 0.0], 180, False),  # below chance
        ([0.2, 0.04], 16, False),  # two images
        ([0.0], 100, False),
        ([0.0, 0.0], 100, False),
        ([0.2, 0.5, 0.9], 100, False),
    ],
)
def test_a_training_has_collapsed_when_robustness_falls_below_a_quarter_of_the_best(shares, images, collapsed):
    assert has_collapsed(shares, images=images, classes=10) == collapsed


class Scripted(Classification):
    """Robust shares of validation, by epoch."""

    shares, epoch = (0.75, 1.0, 0.0, 1.0), -1

    def clean_score(self, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        self.epoch += 1
        return torch.ones(len(labels))

    def adversarial_score(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
        return torch.full((len(labels),), self.shares[self.epoch])


@pytest.mark.parametrize("keep", ["best", "last"])
def test_fast_training_that_collapses_says_so_stops_and_keeps_the_epoch_before(tmp_path, small, make_network, capsys, keep):
    phase = settings(epochs=4, attack_kind="fast", keep=keep)
    adversary = adversarial_training(CONFIG.attack, CONFIG.threat_model, phase)
    checkpoint = Checkpoint(tmp_path, "x")

    def run(task: Classification) -> list[dict[str, float]]:
        return list(train(task, small, phase, adversary=adversary, seed=SEED, machine=CPU, checkpoint=checkpoint))

    history = run(Scripted(make_network()))
    assert [record.get(COLLAPSED) for record in history] == [None, None, 1.0]
    assert [record[WITHSTOOD] for record in history] == [0.75, 1.0, 0.0] and checkpoint.load().best_epoch == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "catastrophic overfitting in epoch 3" in line and "0.0%" in line and "100.0%" in line and "attack.kind = pgd" in line
    assert run(Scripted(make_network())) == history  # taken up again, it is still at its end


def test_a_collapse_before_there_is_an_average_to_keep_is_a_failure(tmp_path, small, make_network):
    phase = settings(epochs=4, attack_kind="fast", average="swa")
    adversary = adversarial_training(CONFIG.attack, CONFIG.threat_model, phase)
    with pytest.raises(Failure, match=r"average_start = 0.75"):
        task, checkpoint = Scripted(make_network()), Checkpoint(tmp_path, "x")
        list(train(task, small, phase, adversary=adversary, seed=SEED, machine=CPU, checkpoint=checkpoint))


def test_contrastive_images_withstand_while_their_own_group_is_nearest(make_network, small):
    network = make_network().eval()
    images, labels = small.validation.images.float() / 255, small.validation.labels
    for scheme in ("CL", "SCL", "EMP"):
        task = make_task(PRETRAIN, scheme, network, small, settings())
        assert task.withstood(images, images, labels).mean() == 1
    task = make_task(PRETRAIN, "CL", network, small, settings())
    assert task.withstood(images, images.roll(1, 0), labels).mean() == 0
    other = make_task(PRETRAIN, "SCL", network, small, settings())
    swapped = torch.cat([images[4:], images[:4]])  # labels repeat every four images
    assert other.withstood(images, swapped, labels).mean() == 1


# What is refused


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["attack.kind=fast", "attack.random_start=false"], r"attack.kind = fast.*attack.random_start = true"),
        (["attack.kind=free", "attack.batch_norm=train"], r"attack.kind = free.*attack.batch_norm = eval"),
        (["regimes.Full-AT.attack_kind=free", "regimes.Full-AT.loss=trades"], r"regimes.Full-AT.loss = trades has no effect"),
        (["attack.kind=free", "pretrain.CL.adversarial_weight=2"], r"pretrain.CL.adversarial_weight = 2 has no effect"),
        (["pretrain.CL.weight_annealing=2", "pretrain.CL.clean_weight=0"], r"weight_annealing sets both weights"),
        (["regimes.ST.attack_kind=fast"], r"regimes.ST.attack_kind = fast has no effect"),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, line):
    with pytest.raises(UserError, match=line) as stopped:
        config.load(PARAMS, overrides)
    assert "\n" not in str(stopped.value)


def test_a_plain_attack_trains_and_validates_by_the_same_adversary():
    made = adversarial_training(CONFIG.attack, CONFIG.threat_model)
    assert made == AdversarialTraining(made.training, made.training) and made.passes(7) == 7
