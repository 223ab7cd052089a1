"""Semi-supervised hybrids: one step of each equals its equations, labels that must not be read change nothing, kills change no bit."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advml import config
from advml.core import memory
from advml.core.device import Machine, generator_for
from advml.core.errors import UserError
from advml.data.augment import view
from advml.data.datasets import Dataset, Split
from advml.models.network import Network
from advml.pipeline.plans import finetuning, pretraining
from advml.recipes import SCHEMES
from advml.training.checkpoint import Checkpoint
from advml.training.streams import Paired, check_images, learnt_from, shares
from advml.training.tasks import hybrid_task
from advml.training.trainer import fit

CPU = Machine(torch.device("cpu"))
HYBRIDS = {name: scheme for name, scheme in SCHEMES.items() if scheme.terms}
EPSILON, STEPS = 0.1, 2
PHASE = "{epochs: 1, batch_size: 16, optimizer: sgd, learning_rate: 0.1, weight_decay: 0.0, schedule: constant, keep: last}"
CONFIG = config.load(
    Path(__file__).parents[2] / "params.yaml",
    [
        *(f"pretrain.{name}={PHASE}" for name in ("CL", "SL", *HYBRIDS)),
        *("views.contrastive={shift: 0.2, brightness: 0.3}", "model.projection_size=16"),
        *(f"attack.steps={STEPS}", f"threat_model.epsilon={EPSILON}", "runtime.device=cpu"),
        *(f"regimes.{regime}.{key}" for regime in ("AT", "Full-AT") for key in ("epochs=1", "batch_size=16")),
    ],
)


def cut(split: Split, start: int, end: int | None = None) -> Split:
    return Split(split.images[start:end], split.labels[start:end])


@pytest.fixture
def data(dataset) -> Dataset:
    """8 labelled images and 24 others, whose labels are there to be misread: two batches of 4 + 12."""
    splits = {"train": cut(dataset.train, 0, 8), "unlabelled": cut(dataset.train, 8, 32), "validation": cut(dataset.validation, 0, 4)}
    return replace(dataset, **splits)


def poisoned(data: Dataset) -> Dataset:
    return replace(data, unlabelled=Split(data.unlabelled.images, torch.full_like(data.unlabelled.labels, -1)))


def state(network: Network) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def pretrain(tmp_path, data) -> Callable[..., Network]:
    """pretrain("CLxSL", "at") trains for an epoch, or as the changes say."""
    made = iter(range(100))

    def run(scheme: str, phase: str, *, data: Dataset = data, checkpoint: Checkpoint | None = None, **options) -> Network:
        changes = {f"pretrain.{scheme}.{key}": value for key, value in options.pop("changes", {}).items()}
        plan = pretraining(config.changed(CONFIG, changes), data, scheme=scheme, phase=phase, seed=0)
        return fit(plan, CPU, checkpoint=checkpoint or Checkpoint(tmp_path / f"scratch{next(made)}", "x"), **options)[0]

    return run


# One step, against a slow transcription of the equations


def literal_contrastive(network: Network, first: Tensor, second: Tensor, groups: list[int]) -> Tensor:
    """Khosla et al. 2020, eq. 2, anchor by anchor, of two views of the same images."""
    z, group, losses = network.embed(torch.cat([first, second])).double(), [*groups, *groups], []
    similarity = (z @ z.T / CONFIG.temperature).exp()
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if group[p] == group[i]]
        losses.append(-sum((similarity[i, p] / similarity[i, others].sum()).log() for p in positives) / len(positives))
    return torch.stack(losses).mean()


def literal_term(network: Network, kind: str, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
    """CE(second, y) for SL; L(first, second) over instances for CL, over classes for SCL."""
    if kind == "SL":
        return F.cross_entropy(network(second), labels)
    return literal_contrastive(network, first, second, list(range(len(first))) if kind == "CL" else labels.tolist())


def literal_views(kind: str, x: Tensor, generator: torch.Generator) -> list[Tensor]:
    """t(x) twice for SL, or t1(x), t2(x)."""
    drawn = [view(x, CONFIG.views.supervised if kind == "SL" else CONFIG.views.contrastive, generator=generator)]
    return 2 * drawn if kind == "SL" else [*drawn, view(x, CONFIG.views.contrastive, generator=generator)]


# (of the labelled images, of the unlabelled images)
TERMS = {"CLxSL": ("SL", "CL"), "CLxSCL": ("SCL", "CL"), "SCLxSL": ("SL", "SCL")}


@pytest.mark.parametrize("phase", ["st", "at"])
@pytest.mark.parametrize("scheme", HYBRIDS)
def test_one_step_equals_the_equations(data, pretrain, scheme, phase):
    """CE or L of 4 labelled images plus L of 12 others, and with an adversary the twin of each: CE(x + d), L(x, x + d)."""
    data = replace(data, train=cut(data.train, 0, 4), unlabelled=cut(data.unlabelled, 0, 12))
    plan = pretraining(CONFIG, data, scheme=scheme, phase=phase, seed=0)
    network, seed = pretraining(CONFIG, data, scheme=scheme, phase=phase, seed=0).network, plan.seed
    start = dict(pretraining(CONFIG, data, scheme=scheme, phase=phase, seed=0).network.named_parameters())
    ours = dict(pretrain(scheme, phase, data=data).named_parameters())

    generator = generator_for("train", seed, 1)
    sides = []
    for which, (kind, split) in enumerate(zip(TERMS[scheme], (data.train, data.unlabelled), strict=True)):
        order = torch.randperm(len(split), generator=generator_for("stream", which, seed, 0))
        sides.append((kind, split.images[order].float() / 255, split.labels[order]))
    network.train()
    loss = sum(literal_term(network, kind, *literal_views(kind, x, generator), labels) for kind, x, labels in sides)
    if phase == "at":
        starts = (2 * torch.rand(16, 1, 8, 8, generator=generator) - 1).mul(EPSILON).split([4, 12])
        network.eval()
        moved = []
        for (kind, x, labels), d in zip(sides, starts, strict=True):
            attacked = (x + d).clamp(0, 1)
            for _ in range(STEPS):
                attacked.requires_grad_()
                (slope,) = torch.autograd.grad(literal_term(network, kind, x, attacked, labels), attacked)
                attacked = (attacked + 2.5 * EPSILON / STEPS * slope.sign()).detach()
                attacked = torch.minimum(torch.maximum(attacked, x - EPSILON), x + EPSILON).clamp(0, 1)
            moved.append(attacked)
        network.train()
        loss = loss + sum(literal_term(network, kind, x, d, labels) for (kind, x, labels), d in zip(sides, moved, strict=True))
    names, weights = zip(*((name, value) for name, value in network.named_parameters() if value.requires_grad), strict=True)
    slopes = torch.autograd.grad(loss, weights)  # every weight learns: none is left over
    expected = {name: value.data - 0.1 * 1.9 * slope for name, value, slope in zip(names, weights, slopes, strict=True)}  # SGD, Nesterov

    moved = sum((expected[key] - start[key]).square().sum() for key in expected).sqrt()
    apart = sum((expected[key] - ours[key]).square().sum() for key in expected).sqrt()
    assert moved > 1e-2 and apart < 1e-3 * moved
    assert {name.split(".")[0] for name in names} == {"encoder", "projection_head", *(["classifier"] if scheme != "CLxSCL" else [])}


@pytest.mark.parametrize("scheme", HYBRIDS)
@pytest.mark.parametrize("attacked", ["image", "views"])
def test_views_are_told_apart_and_those_that_free_training_perturbs_come_last(make_network, scheme, attacked):
    """CL with three views beside SL with one; and all are perturbed, or the last of each."""
    phase = CONFIG.pretrain[scheme].model_copy(update={"attacked": attacked, "views": 3})
    about = {"views": CONFIG.views, "temperature": CONFIG.temperature}
    task = hybrid_task(make_network().eval(), SCHEMES[scheme], phase, sizes=(2, 4), **about)
    images, labels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 1])
    views = task.views(images, generator=torch.Generator().manual_seed(1))
    generator, own = torch.Generator().manual_seed(1), []
    for one, x in zip(task.tasks, images.split([2, 4]), strict=True):
        own.append(one.views(x, generator=generator))
    losses = [one.loss_of_views(v, y).mean() for one, v, y in zip(task.tasks, own, labels.split([2, 4]), strict=True)]
    assert torch.allclose(task.loss_of_views(views, labels).mean(), sum(losses))
    rows = task.perturbed_rows(6)
    last = torch.cat(own) if attacked == "views" else torch.cat([own[0][-2:], own[1][-4:]])
    assert len(views) == len(torch.cat(own)) and torch.equal(views[-rows:], last)


# Streams


def drawn(stream: Paired, epochs: range) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in epochs:
        for batch in stream(epoch, torch.Generator()).split(sum(stream.sizes)):
            yield batch.split(stream.sizes)


def test_streams_begin_anew_in_another_order_when_they_end_and_follow_from_the_epoch_alone(dataset):
    """10 labelled images in threes leave one out of each pass; 20 others in sixes, two."""

    def stream(seed: int = 1) -> Paired:
        return Paired(cut(dataset.train, 0, 10), cut(dataset.train, 10, 30), batch_size=9, seed=seed)

    assert (stream().sizes, stream().count, len(stream().split)) == ((3, 6), 3, 30)
    batches = list(drawn(stream(), range(1, 8)))
    for place, (length, start) in enumerate(((10, 0), (20, 10))):
        per_pass = length // stream().sizes[place]
        passes = [torch.cat([batch[place] for batch in batches[i : i + per_pass]]) for i in range(0, len(batches), per_pass)]
        assert all(len(one) == len(one.unique()) for one in passes), "an image twice in a pass"
        assert torch.cat(passes).unique().tolist() == list(range(start, start + length)), "all are reached"
        assert not torch.equal(passes[0], passes[1])
    later, other = drawn(stream(), range(4, 6)), next(drawn(stream(seed=2), range(1, 2)))
    assert all(torch.equal(torch.cat(one), torch.cat(two)) for one, two in zip(batches[9:15], later, strict=True))
    assert not torch.equal(torch.cat(other), torch.cat(batches[0]))


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "batch_size", "expected"),
    [(10, 90, 50, (5, 45)), (10, 9990, 100, (2, 98)), (990, 10, 100, (98, 2)), (3, 5, 8, (3, 5)), (3, 5, 100, (3, 5)), (50, 50, 5, (2, 3))],
)
def test_a_batch_is_shared_by_the_numbers_of_images_but_two_at_least(labelled, unlabelled, batch_size, expected):
    assert shares(labelled, unlabelled, batch_size=batch_size) == expected


# Labels


@pytest.mark.parametrize("scheme", ["CL", "CLxSL", "CLxSCL"])
def test_poisoned_labels_of_the_unlabelled_images_change_nothing(data, pretrain, scheme):
    clean = state(pretrain(scheme, "at"))
    assert same(clean, state(pretrain(scheme, "at", data=poisoned(data))))
    images = replace(data, unlabelled=Split(data.unlabelled.images.flip(3), data.unlabelled.labels))
    assert not same(clean, state(pretrain(scheme, "at", data=images))), "the images are learnt from"


@pytest.mark.parametrize("regime", ["AT", "Full-AT"])
def test_fine_tuning_reads_no_unlabelled_image(tmp_path, data, make_network, regime):
    """SL and SCL neither: they learn from the labelled images alone."""
    without = replace(data, unlabelled=None)
    for scheme in ("SL", "SCL"):
        assert learnt_from(data, SCHEMES[scheme]).unlabelled is None and learnt_from(data, SCHEMES[scheme]).train is data.train
    found = []
    for place, seen in enumerate((data, without)):
        plan = finetuning(CONFIG, seen, CPU, make_network(), scheme="CLxSCL", regime=regime, seed=0)
        found.append(state(fit(plan, CPU, checkpoint=Checkpoint(tmp_path / f"{place}", "x"))[0]))
    assert same(*found)


def test_the_joint_objective_reads_all_labels_and_is_refused_where_there_are_none(data, pretrain):
    """SCLxSL: L over classes of images beyond the budget."""
    other = replace(data, unlabelled=Split(data.unlabelled.images, data.unlabelled.labels // 2))
    assert not same(state(pretrain("SCLxSL", "st")), state(pretrain("SCLxSL", "st", data=other)))
    with pytest.raises(UserError, match=r"SCLxSL.* 24 "):
        pretrain("SCLxSL", "st", data=poisoned(data))


@pytest.mark.parametrize("scheme", HYBRIDS)
def test_a_hybrid_without_unlabelled_images_is_refused_with_the_keys_that_give_some(data, scheme):
    with pytest.raises(UserError, match=rf"{scheme}.* data\.label_budget .* data\.unlabelled"):
        check_images(SCHEMES[scheme], replace(data, unlabelled=None), batch_size=16)
    with pytest.raises(UserError, match=rf"pretrain\.{scheme}\.batch_size = 3 .* 4 or more"):
        pretraining(config.changed(CONFIG, {f"pretrain.{scheme}.batch_size": 3}), data, scheme=scheme, phase="st", seed=0)


def test_all_images_of_data_larger_than_memory_are_kept_in_a_file_together(monkeypatch, data, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    expected = learnt_from(data, SCHEMES["CL"]).train
    monkeypatch.setattr(memory, "available", lambda: 64)
    found = learnt_from(data, SCHEMES["CL"]).train
    assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
    assert "32 images of 1x8x8 need" in capsys.readouterr().err and not list((tmp_path / ".scratch" / "prepare").iterdir())


def test_cl_alone_learns_from_images_of_no_class_and_what_needs_labels_is_refused(data, pretrain, make_network):
    flat = replace(
        data, **{name: Split(split.images, torch.full_like(split.labels, -1)) for name, split in data.splits.items()}, classes=()
    )
    flat = replace(flat, unlabelled=None)
    assert same(state(pretrain("CL", "at", data=flat)), state(pretrain("CL", "at", data=replace(data, unlabelled=None))))
    for scheme in ("SL", "SCL", *HYBRIDS):
        with pytest.raises(UserError, match=f"{scheme} needs labels, and no image"):
            pretraining(CONFIG, flat, scheme=scheme, phase="st", seed=0)
    with pytest.raises(UserError, match="fine-tuning needs labels"):
        finetuning(CONFIG, flat, CPU, make_network(), scheme="CL", regime="AT", seed=0)


# Kills


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("scheme", "phase", "replays", "kills"), [("CLxSL", "st", 1, 20), ("CLxSCL", "at", 3, 2)])
def test_kills_change_no_bit(tmp_path, data, pretrain, scheme, phase, replays, kills):
    """In epochs 2, 3, ..., after a step and before it is saved, each continued by a fresh network, under another global state."""
    changes = {"epochs": (kills + 1) * replays, "batch_size": 20, "attack_steps": replays, "attack_kind": "free", "optimizer": "adamw"}
    whole, epochs = pretrain(scheme, phase, changes=changes), Counter()

    def kill_in(wanted: int) -> Callable[[int, int, Tensor], None]:
        def on_batch(epoch: int, done: int, loss: Tensor) -> None:
            epochs[epoch] += 1
            if epoch == wanted:
                raise Killed

        return on_batch

    for kill in range(2, kills + 3):
        torch.manual_seed(kill)
        with pytest.raises(Killed) if kill < kills + 2 else contextlib.nullcontext():
            resumed = pretrain(scheme, phase, changes=changes, checkpoint=Checkpoint(tmp_path / "killed", "x"), on_batch=kill_in(kill))
    assert same(state(whole), state(resumed)) and epochs == {1: 1, **dict.fromkeys(range(2, kills + 2), 2)}
