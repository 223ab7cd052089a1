"""One evaluation holds everything: figures, flags, corruptions; and whatever is remembered is not computed again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from advml import config
from advml.core.device import Machine
from advml.core.errors import UserError
from advml.core.result_cache import Memo
from advml.evaluation import evaluate as evaluation
from advml.evaluation.attack_suite import attack_suite
from advml.evaluation.masking import diagnose
from advml.evaluation.records import AT_CHANCE, flag_summary, is_at_chance
from advml.evaluation.run_attacks import _Batch
from advml.models.adapter import Foreign
from advml.report.show import flags_of

PARAMS = Path(__file__).parents[2] / "params.yaml"
CPU = Machine(torch.device("cpu"))
QUICK = (
    *("evaluate.steps=2", "evaluate.batch_size=16", "evaluate.adversarial_images=5", "worst_case.attacks=[pgd-margin]"),
    *("worst_case.restarts=1", "diagnostics.images=8", "diagnostics.steps=2", "corruptions.names=[contrast, fog]"),
    "corruptions.severities=[1, 5]",
)


@pytest.fixture
def subject() -> evaluation.Subject:
    linear = nn.Linear(64, 4)
    linear.weight.data = 0.1 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    linear.bias.data.zero_()
    return evaluation.Subject("X", "d" * 64, nn.Sequential(nn.Flatten(), linear))


@pytest.fixture
def able(subject, dataset) -> evaluation.Subject:
    """A subject that classifies by the nearest of the classes' mean pictures, and is right."""
    images, labels = dataset.train.images / 255, dataset.train.labels
    means = torch.stack([images[labels == label].mean(0).flatten() for label in range(4)])
    subject.network[1].weight.data, subject.network[1].bias.data = means, -means.square().sum(1) / 2
    return subject


def settings(*overrides: str) -> evaluation.EvaluationSettings:
    asked = config.load(PARAMS, [*QUICK, *overrides])
    spec, about = asked.evaluate, {"temperature": asked.temperature, "classes": 4}
    attacks = attack_suite(spec, asked.threat_model, asked.worst_case, None, **about)
    more = {"diagnostics": asked.diagnostics, "corruptions": asked.corruptions, "keep": spec.adversarial_images}
    return evaluation.EvaluationSettings(tuple(attacks), batch_size=spec.batch_size, seed=spec.seed, **more)


def evaluate(subject, dataset, *overrides: str, folder: Path | None = None, **options) -> evaluation.Evaluation:
    return evaluation.evaluate(subject, dataset, settings(*overrides), CPU, memo=Memo(folder), **options)


TWO = [{"name": name, "saw": "it", "try": "that"} for name in ("randomised", "success_lost")]


@pytest.mark.parametrize(
    ("planted", "number", "verdict"),
    [
        ({"flags": TWO, "evidence": {}}, 2, "randomised, success_lost"),
        ({"flags": [], "evidence": {}}, 0, "none"),
        ({"flags": [], "skipped": "it fails on a batch"}, None, "not judged"),
    ],
    ids=["two flags", "none", "not judged"],
)
def test_the_metrics_count_the_flags_and_nothing_is_said_of_corruptions_unasked(able, dataset, monkeypatch, planted, number, verdict):
    monkeypatch.setattr(diagnose, "diagnose", lambda *arguments, **options: planted)
    found = evaluate(able, dataset, "corruptions.names=none")
    assert found.metrics.get("diagnostics/flags") == number and flag_summary(found.record["diagnostics"]) == verdict
    assert found.record["diagnostics"] == planted
    assert found.record["corruptions"] == {} and not any(name.startswith("corruption") for name in found.metrics)


def test_diagnostics_of_no_image_are_not_made(able, dataset, monkeypatch):
    monkeypatch.setattr(diagnose, "diagnose", forbidden)
    found = evaluate(able, dataset, "diagnostics.images=0", "corruptions.names=none")
    assert "diagnostics/flags" not in found.metrics and flag_summary(found.record["diagnostics"]) == "not judged"
    assert found.record["diagnostics"] == {"flags": [], "skipped": "diagnostics.images = 0"}


@pytest.mark.parametrize("images", [0, 8], ids=["off", "failing"])
def test_a_flag_that_needs_no_probe_is_counted_and_named_although_the_probes_were_not_run(able, dataset, monkeypatch, images):
    def fail(*_: object, **__: object) -> None:
        raise UserError("it fails on a batch")

    class Stubborn(nn.Sequential):
        def __deepcopy__(self, memo: dict) -> None:
            raise TypeError("cannot be copied")

    monkeypatch.setattr(diagnose, "probe", fail)
    stubborn = replace(able, network=Stubborn(*able.network))
    found = evaluate(stubborn, dataset, f"diagnostics.images={images}", "corruptions.names=none")
    assert flag_summary(found.record["diagnostics"]) == "not_copied" and found.metrics["diagnostics/flags"] == 1
    first, second = flags_of(found.record)
    assert "! not_copied" in first and "not judged" in second


@pytest.mark.parametrize("images", [0, 8], ids=["unprobed", "probed"])
def test_a_model_at_chance_is_flagged_with_its_accuracy_and_that_of_the_most_frequent_class(subject, dataset, images):
    quick = (f"diagnostics.images={images}", "corruptions.names=none", "worst_case.attacks=[]")
    subject.network[1].weight.data.zero_()
    found = evaluate(subject, dataset, *quick)
    (flag,) = (flag for flag in found.record["diagnostics"]["flags"] if flag["name"] == AT_CHANCE)
    assert "25.0%" in flag["saw"] and "40 test images" in flag["saw"] and found.metrics["diagnostics/flags"] >= 1
    assert is_at_chance(found.record) and not is_at_chance({}) and not is_at_chance(None)


def test_a_model_above_chance_is_not_flagged(able, dataset):
    assert not is_at_chance(evaluate(able, dataset, "diagnostics.images=0", "corruptions.names=none").record)


class Remembering(nn.Module):
    """Gives the opposite logits once a gradient with respect to its images has been asked for, or an image is out of the ordinary."""

    def __init__(self, network: nn.Module, ordinary: float = 1.0) -> None:
        super().__init__()
        self.network, self.ordinary, self.attacked = network, ordinary, False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.attacked |= images.requires_grad or bool(images.mean() > self.ordinary)
        return self.network(images) * (-1 if self.attacked else 1)


def test_corruptions_are_scored_on_a_model_that_remembers_no_attack(able, dataset):
    plain = evaluate(able, dataset, "diagnostics.images=0")
    found = evaluate(replace(able, network=Remembering(able.network)), dataset, "diagnostics.images=0")
    shares = {name: value for name, value in plain.metrics.items() if name.startswith("corruption/") or name == "accuracy/clean"}
    assert shares["corruption/mean"] > 0.5 and {name: found.metrics[name] for name in shares} == shares


def test_a_corruption_is_scored_alike_whichever_comes_before_it(able, dataset):
    bright = float((dataset.test.images / 255).mean()) + 0.1

    def contrast(names: str) -> float:
        remembering = replace(able, network=Remembering(able.network, ordinary=bright))
        return evaluate(remembering, dataset, "diagnostics.images=0", f"corruptions.names=[{names}]").metrics["corruption/contrast"]

    assert contrast("contrast") == contrast("brightness, contrast") > 0.5


def test_an_evaluation_holds_accuracies_flags_corruptions_samples_and_images(subject, dataset):
    found = evaluate(subject, dataset)
    accuracies = ("accuracy/clean", "accuracy/threat_model_2", "accuracy/threat_model_2_half", "accuracy/worst_case")
    shares = (*accuracies, "corruption/contrast", "corruption/fog", "corruption/mean")
    assert set(found.metrics) == {"diagnostics/flags", *(f"{name}{end}" for name in shares for end in ("", "/low", "/high"))}
    assert set(found.record["figures"]) == set(accuracies) and set(found.record["corruptions"]) == {"corruption/contrast", "corruption/fog"}
    for name, described in found.record["corruptions"].items():
        assert described["severities"] == [1, 5] and described["n"] == len(dataset.test) and described["source"] == "computed"
        assert found.metrics[name] == pytest.approx(sum(described["accuracies"]) / 2)
    assert found.metrics["corruption/mean"] == pytest.approx((found.metrics["corruption/contrast"] + found.metrics["corruption/fog"]) / 2)
    assert found.samples.num_rows == len(dataset.test) and found.images.shape == (5, 1, 8, 8) and found.kept["n"] == 5
    for name, described in found.record["figures"].items():
        assert found.metrics[name] == described["correct"] / described["n"]


def test_every_part_draws_from_the_seed_and_works_in_the_batches_of_the_settings(subject, dataset):
    record = evaluate(subject, dataset, "evaluate.seed=5", "corruptions.names=none").record
    attacked = [figure for name, figure in record["figures"].items() if name != "accuracy/clean"]
    assert {(figure["seed"], figure["batch_size"]) for figure in attacked} == {(5, 16)}
    assert record["diagnostics"]["evidence"]["seed"] == 5


def forbidden(*arguments: object, **options: object) -> None:
    raise AssertionError("computed although it was remembered")


def forbid(monkeypatch) -> None:
    monkeypatch.setattr(_Batch, "measure", forbidden)
    monkeypatch.setattr(diagnose, "diagnose", forbidden)
    monkeypatch.setattr(evaluation.corruption, "one", forbidden)


def test_what_is_remembered_is_not_computed_again(subject, dataset, monkeypatch, tmp_path):
    first = evaluate(subject, dataset, folder=tmp_path)
    forbid(monkeypatch)
    again = evaluate(subject, dataset, folder=tmp_path)
    assert again.metrics == first.metrics and again.record == first.record and again.samples.equals(first.samples)
    assert torch.equal(again.images, first.images) and again.kept == first.kept


@pytest.mark.parametrize("part", ["accuracy.clean.batch.0.safetensors", "diagnostics.json", "corruption.fog.safetensors"])
def test_every_part_is_remembered_by_itself(subject, dataset, monkeypatch, tmp_path, part):
    evaluate(subject, dataset, folder=tmp_path)
    (tmp_path / part).unlink()
    forbid(monkeypatch)
    with pytest.raises(AssertionError, match=r"although it was remembered"):
        evaluate(subject, dataset, folder=tmp_path)


@pytest.mark.parametrize(
    "without", [(), ("diagnostics.images=0",), ("corruptions.names=none",), ("diagnostics.images=0", "corruptions.names=none")]
)
def test_the_bar_never_goes_back_and_ends_at_all_of_the_work(subject, dataset, without):
    told = []
    found = evaluate(subject, dataset, *without, on_progress=lambda done, note: told.append((done, note)))
    counts, work = [done for done, _ in told], settings(*without).parts * len(dataset.test)
    assert counts == sorted(counts) and counts[-1] == work == (6 - len(without)) * len(dataset.test)
    assert told[-1][1] == f"worst case {100 * found.metrics['accuracy/worst_case']:.1f} %"


def test_the_bar_says_what_of_the_worst_case_stands_so_far(able, dataset):
    told = []
    found = evaluate(able, dataset, "threat_model.epsilon=0.2", on_progress=lambda done, note: told.append(note))
    so_far = [float(note.removeprefix("worst case so far ").removesuffix(" %")) for note in told if "so far" in note]
    clean, worst = (100 * found.metrics[f"accuracy/{name}"] for name in ("clean", "worst_case"))
    assert so_far == sorted(so_far, reverse=True) and so_far[0] > so_far[-1]
    assert so_far[2] == pytest.approx(clean, abs=0.05)  # after three batches of clean images
    assert so_far[-1] >= worst - 0.05


class Rooted(nn.Module):
    """sqrt(0): the value is right, its derivative is infinite, and 0 times that is not a number."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images) + 0 * (images - images.detach()).pow(2).flatten(1).sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("wall", [lambda network: network, Foreign], ids=["ours", "foreign"])
def test_gradients_that_are_not_finite_are_flagged_and_stop_no_attack(able, dataset, norm, wall):
    network = wall(Rooted(able.network))
    attacks = "worst_case.attacks=[pgd-margin, apgd-ce, apgd-t, fab-t, square]"
    small = ("threat_model.epsilon=0.001", "worst_case.steps=3", "worst_case.targets=2", "worst_case.queries=3", "corruptions.names=none")
    found = evaluate(replace(able, network=network), dataset, f"threat_model.norm={norm}", attacks, *small)
    assert "dead_gradients" in flag_summary(found.record["diagnostics"]) and found.record["diagnostics"]["evidence"]["non_finite"] > 0
    assert found.metrics["accuracy/worst_case"] <= found.metrics["accuracy/clean"]


def test_logits_that_are_no_numbers_stop_no_attack(able, dataset):
    class Holey(Rooted):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.where((images.flatten(1).amax(1) > 0.97)[:, None], torch.nan, self.network(images))

    attacks = "worst_case.attacks=[pgd-margin, apgd-ce, apgd-t, fab-t, square]"
    small = ("worst_case.steps=3", "worst_case.targets=2", "worst_case.queries=3", "corruptions.names=none")
    found = evaluate(replace(able, network=Holey(able.network)), dataset, "threat_model.norm=l2", attacks, *small)
    assert found.metrics["accuracy/worst_case"] <= found.metrics["accuracy/clean"]


@pytest.mark.parametrize("most", [2, 15])
def test_a_model_that_fails_on_a_full_batch_is_one_line_before_any_attack(subject, dataset, monkeypatch, most):
    class Narrow(Rooted):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert len(images) <= most, "too many"
            return self.network(images)

    monkeypatch.setattr(evaluation, "run_attacks", forbidden)
    with pytest.raises(UserError, match=r"^their:model .*16x1x8x8.*too many$"):
        evaluate(replace(subject, network=Foreign(Narrow(subject.network), "their:model")), dataset)


def test_a_model_that_gives_no_logits_for_a_single_image_is_one_line(subject, dataset):
    class Squeezed(Rooted):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images).squeeze()

    with pytest.raises(UserError, match=r"\(4,\).*\(1, 4\)"):
        evaluate(replace(subject, network=Squeezed(subject.network)), dataset)


def test_what_the_diagnostics_break_is_in_metrics_record_and_samples(able, dataset):
    """PGD of a single tiny step breaks nothing; the probes do."""
    weak = ("evaluate.step_size=1e-9", "evaluate.random_start=false", "worst_case.attacks=[]", "threat_model.epsilon=0.2")
    found = evaluate(able, dataset, *weak, "corruptions.names=none", "diagnostics.steps=10")
    clean, worst = (round(len(dataset.test) * found.metrics[f"accuracy/{name}"]) for name in ("clean", "worst_case"))
    steps = {step["name"]: step["broke"] for step in found.record["figures"]["accuracy/worst_case"]["cascade"]}
    assert list(steps)[-3:] == ["probe-pgd", "probe-step", "probe-noise"] and steps["probe-pgd"] > 0
    rows = found.samples.to_pylist()
    assert sum(row["broken_by"] is None for row in rows) == worst == clean - sum(steps.values())
    assert all(0 < row["distance"] <= 0.2 + 1e-5 for row in rows if row["broken_by"] == "probe-pgd")
    assert "figure_too_high" in flag_summary(found.record["diagnostics"])
