"""advml from Python: the examples run, figures and weights are those of the commands, and nothing else changes."""

from __future__ import annotations

import copy
import doctest
import importlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advml
from advml import api, config
from advml.config.presets import preset
from advml.core.errors import UserError
from advml.models import external
from advml.pipeline.stages import evaluate as evaluate_stage
from advml.pipeline.stages import train as train_stage

MODULES = ("advml.api", *(f"advml.api.{name}" for name in ("attack", "evaluate", "layers", "models", "train")))
QUICK = ("worst_case.attacks=[]", "diagnostics.images=0", "evaluate.steps=3")


@pytest.fixture(scope="module")
def examples() -> dict[str, object]:
    """The names that the examples of the functions go on with: those of the module's own."""
    example = doctest.DocTestFinder(recurse=False).find(api, "api", globs={})[0]
    doctest.DocTestRunner().run(example, clear_globs=False)
    return example.globs


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_the_api_run(module, examples):
    found = doctest.testmod(importlib.import_module(module), extraglobs=examples)
    assert not found.failed


def test_importing_the_package_imports_no_torch_and_its_names_are_those_of_the_api():
    code = "import sys, advml; assert 'torch' not in sys.modules; print(' '.join(sorted(dir(advml))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {*api.__all__, "__version__"}
    assert all(getattr(advml, name) is getattr(api, name) for name in api.__all__)
    assert all(getattr(api, name).__doc__ for name in api.__all__)
    with pytest.raises(AttributeError, match="atack"):
        advml.atack  # noqa: B018


@pytest.fixture
def model() -> nn.Module:
    """Linear, in training mode, with a dropout, which only eval mode switches off."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4)).train()


def images_of(split) -> tuple[torch.Tensor, torch.Tensor]:
    return split.images.float() / 255, split.labels


# Attack


def test_the_attack_on_a_linear_model_gains_epsilon_times_the_dual_norm(model):
    """For two classes the margin is linear: within the ball, and away from the box, its change has a closed form."""
    binary, images, epsilon = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(6, 1, 8, 8) * 0.4 + 0.3, 0.1
    labels = torch.zeros(6, dtype=torch.int64)
    weights = (binary[1].weight[1] - binary[1].weight[0]).detach()
    for norm, dual in (("linf", weights.abs().sum()), ("l2", weights.norm())):
        attacked = advml.attack(binary, images, labels, epsilon=epsilon, norm=norm, objective="margin", steps=10, random_start=False)
        logits, before = binary(attacked), binary(images)
        gain = (logits[:, 1] - logits[:, 0]) - (before[:, 1] - before[:, 0])
        torch.testing.assert_close(gain, torch.full((6,), float(epsilon * dual)), rtol=1e-4, atol=1e-5)


def test_the_attack_does_not_depend_on_the_batch_and_takes_grey_levels(model, dataset):
    images, labels = images_of(dataset.test)
    whole = advml.attack(model, images, labels, epsilon=0.1, steps=4)
    assert torch.equal(whole, advml.attack(model, dataset.test.images, labels, epsilon=0.1, steps=4))
    torch.testing.assert_close(whole, advml.attack(model, images, labels, epsilon=0.1, steps=4, batch_size=7))
    assert not torch.equal(whole, advml.attack(model, images, labels, epsilon=0.1, steps=4, seed=1))


def test_without_labels_the_attack_leads_away_from_what_the_model_predicts(model, dataset):
    images, _ = images_of(dataset.test)
    predicted = model.eval()(images).argmax(1)
    assert torch.equal(advml.attack(model, images, epsilon=0.1), advml.attack(model, images, predicted, epsilon=0.1))


# The same as the commands


def test_evaluate_gives_the_figures_of_the_command(make_study, dataset, monkeypatch, tmp_path):
    """A foreign module in tensors, and `advml evaluate module:function` on the study that holds them."""
    (tmp_path / "borrowed.py").write_text(
        "import torch\n\ndef make():\n    torch.manual_seed(3)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)).eval()\n"
    )
    monkeypatch.chdir(tmp_path)
    study = make_study()
    context = study.context()
    given = external.load("borrowed:make", spec=context.config.model, dataset=context.dataset)
    metrics = evaluate_stage.run_given(context, given)
    images, labels = images_of(dataset.test)
    about = {"params": study.params, "corruptions": True, "validation": images_of(dataset.validation)}
    measured = advml.evaluate(given.network.module, images, labels, classes=dataset.classes, **about)
    assert measured.metrics == metrics
    assert measured.figures["accuracy/clean"] == tuple(metrics[f"accuracy/clean{end}"] for end in ("", "/low", "/high"))
    loader = DataLoader(TensorDataset(images, labels), batch_size=13)
    again = advml.evaluate(given.network.module, loader, **about)
    assert again.metrics == metrics and again.verdicts.num_rows == len(labels)


def test_training_passes_images_in_parts_where_it_is_asked_to(study, dataset):
    overrides = ["runtime.micro_batch=8", "pretrain.SL.epochs=1"]
    trained = advml.train(
        "SL", "ST", *images_of(dataset.train), validation=images_of(dataset.validation), params=study.params, overrides=overrides
    )
    assert trained.model.micro_batch == 8
    assert repr(trained).startswith("Trained(SL-ST-s0, ") and "validation/accuracy 0." in repr(trained) and len(repr(trained)) < 200


def test_train_gives_the_weights_of_the_command_and_evaluate_the_figures_of_the_model(make_study, dataset, tmp_path):
    study = make_study()
    context = study.context()
    metrics = train_stage.run(context, scheme="CL", regime="Full-AT", seed=0)
    stored = advml.load_model(study.workspace.model("CL-Full-AT-s0"))
    train, validation = images_of(dataset.train), images_of(dataset.validation)
    trained = advml.train("CL", "Full-AT", *train, validation=validation, params=study.params)
    found, wanted = trained.model.state_dict(), stored.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(trained.pretraining) == len(trained.finetuning) == 2 and not trained.model.training
    trained.save(tmp_path / "saved")
    again = advml.load_model(tmp_path / "saved")
    measured = advml.evaluate(again, *images_of(dataset.test), params=study.params, corruptions=True, scheme="CL")
    assert measured.metrics == metrics


# What it leaves behind, prints and refuses


def test_nothing_is_printed_and_model_random_numbers_and_settings_are_as_before(model, dataset, capfd):
    images, labels = images_of(dataset.test)
    weights, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    cudnn, threads = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark), torch.get_num_threads()
    advml.attack(model, images, labels, epsilon=0.1)
    advml.evaluate(model, images, labels, params="smoke")
    advml.compare_layers(model, model, images)
    advml.probe_layers(model, (images, labels), (images, labels), {"clean": (images, labels)})
    assert capfd.readouterr() == ("", "")
    assert all(module.training for module in model.modules()) and all(value.grad is None for value in model.parameters())
    assert all(value.requires_grad for value in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == cudnn


def test_a_constant_is_flagged_as_at_chance_without_probes(dataset):
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    nn.init.zeros_(constant[1].weight)
    measured = advml.evaluate(constant, *images_of(dataset.test), overrides=QUICK)
    assert [flag["name"] for flag in measured.flags] == ["at_chance"] and "at_chance" in repr(measured) and not measured.judged


def test_an_attack_for_which_there_are_too_few_classes_is_named_in_record_and_remarks(dataset):
    images, labels = images_of(dataset.test)
    few = (images[labels < 3], labels[labels < 3])
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    quick = ("worst_case.attacks=[apgd-t]", "diagnostics.images=0", "evaluate.steps=1", "worst_case.restarts=1")
    measured = advml.evaluate(network, *few, overrides=quick)
    worst = measured.record["figures"]["accuracy/worst_case"]
    assert list(worst["not_run"]) == ["apgd-t"] and "4 classes" in worst["not_run"]["apgd-t"]
    assert "apgd-t" not in [step["name"] for step in worst["cascade"]] and "apgd-t" in measured.remarks[-1]


def test_a_wrong_normalisation_raises_a_flag(dataset):
    """Class means as templates, for images of mean 0 and deviation 1 in the units of ImageNet's constants."""
    train, means = dataset.train.images.float() / 255, []
    for label in range(4):
        means.append(((train[dataset.train.labels == label].mean(0) - 0.5) / 0.5).flatten())
    weights = torch.stack(means)
    linear = nn.Linear(64, 4)
    with torch.no_grad():
        linear.weight.copy_(weights)
        linear.bias.copy_(-weights.square().sum(1) / 2)
    model, split = nn.Sequential(nn.Flatten(), linear), images_of(dataset.test)
    wrong, right = (advml.evaluate(model, *split, overrides=QUICK, **more) for more in ({}, {"mean": "half"}))
    assert right.figures["accuracy/clean"].value == 1
    assert [flag["name"] for flag in right.flags] == []
    if wrong.figures["accuracy/clean"].value < 0.9:
        assert "other_normalization" in [flag["name"] for flag in wrong.flags] and "other_normalization" in repr(wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": lambda x: 255 * x}, "images range from"),
        ({"images": lambda x: x * torch.nan}, "images range from nan"),
        ({"images": lambda x: x[0]}, "images must be (N, C, H, W) with N at least 1, not (1, 8, 8)"),
        ({"images": lambda x: x.numpy()}, "images must be a tensor, not ndarray"),
        ({"labels": lambda y: y.float()}, "whole numbers, not torch.float32"),
        ({"labels": lambda y: y.tolist()}, "whole numbers, not list"),
        ({"labels": lambda y: y[:3]}, "one class per image, (40,), not (3,)"),
        ({"labels": lambda y: y - 1}, "smallest label is -1"),
        ({"epsilon": lambda e: 8}, "epsilon = 8"),
        ({"epsilon": lambda e: 0}, "epsilon = 0"),
        ({"norm": lambda n: "l1"}, "norm = 'l1'"),
        ({"objective": lambda n: "cw"}, "objective = 'cw'"),
        ({"steps": lambda n: 0}, "steps = 0"),
        ({"steps": lambda n: 2.5}, "steps = 2.5"),
        ({"labels": lambda y: y + 9}, "label 12 is out of range: there are 4 classes"),
        ({"images": lambda x: x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)}, "images.permute(0, 3, 1, 2)"),
        ({"images": lambda x: x[..., 1:]}, "model fails on a batch of 2x1x8x7 images"),
        ({"epsilon": lambda e: "8/x"}, "epsilon = '8/x'"),
        ({"keep": lambda k: "first"}, "keep = 'first'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model, dataset, change, words):
    images, labels = images_of(dataset.test)
    asked = {"images": images, "labels": labels, "epsilon": 0.1, "norm": "linf", "objective": "ce", "steps": 2, "keep": "best"}
    asked |= {name: how(asked[name]) for name, how in change.items()}
    with pytest.raises(UserError) as refused:
        advml.attack(model, **asked)
    assert words in str(refused.value) and "\n" not in str(refused.value)


class Wrapped(nn.Module):
    """A model with a function after it."""

    def __init__(self, model: nn.Module, after) -> None:
        super().__init__()
        self.model, self.after = model, after

    def forward(self, images: torch.Tensor) -> object:
        return self.after(self.model(images))


def test_logits_are_found_and_types_matched_in_an_attack_as_in_an_evaluation(model, dataset):
    images, labels = images_of(dataset.test)
    wanted = advml.attack(model, images, labels, epsilon=8 / 255, steps=2)
    assert torch.equal(advml.attack(model, images, labels, epsilon="8/255", steps=2), wanted)
    assert torch.equal(advml.attack(model, DataLoader(TensorDataset(images, labels), batch_size=13), epsilon=8 / 255, steps=2), wanted)
    for after in (lambda logits: {"logits": logits}, lambda logits: (logits, 0)):
        assert torch.equal(advml.attack(Wrapped(model, after), images, labels, epsilon=8 / 255, steps=2), wanted)
    for dtype in (torch.float64, torch.bfloat16):
        other = copy.deepcopy(model).to(dtype)
        assert (advml.attack(other, images, labels, epsilon=8 / 255, steps=2) - wanted).abs().max() <= 16 / 255 + 1e-6
        assert advml.evaluate(other, images, labels, overrides=[*QUICK, "evaluate.steps=1"]).figures


def test_models_that_cannot_be_attacked_are_refused_in_one_line(model, dataset):
    images, labels = images_of(dataset.test)
    detached, unread = Wrapped(model, torch.Tensor.detach), Wrapped(model, lambda logits: {"scores": logits})
    between = images * 0.999  # not grey levels, so that they stay floats
    probability = Wrapped(nn.Flatten(), lambda pixels: torch.sigmoid(99 * (pixels.mean(1) - between.mean())))
    for asked, words in (
        (lambda: advml.attack(detached, images, labels, epsilon=0.1), "no gradient"),
        (lambda: advml.attack(unread, images, epsilon=0.1), "returns dict"),
        (lambda: advml.attack(lambda batch: model(batch), images, labels, epsilon=0.1), "type function"),
        (lambda: advml.compare_layers(model, lambda batch: model(batch), images), "type function"),
        (lambda: advml.compare_layers(model, copy.deepcopy(model).double(), images), "fails on a batch"),
        (lambda: advml.attack(probability, between, labels % 2, epsilon=0.1), "a probability"),
        (torch.inference_mode()(lambda: advml.attack(model, images, labels, epsilon=0.1)), "inference_mode"),
    ):
        with pytest.raises(UserError) as refused:
            asked()
        assert words in str(refused.value) and "\n" not in str(refused.value)


def test_one_word_may_stand_for_a_list_of_it(model, dataset):
    images, labels = images_of(dataset.test)
    assert advml.compare_layers(model, model, images, layers="2", batch_size=20).rows == ("2",)
    assert list(advml.probe_layers(model, (images, labels), (images, labels), {}, layers="2")) == ["2"]
    settings = config.validate(config.apply(preset("digits"), QUICK))
    measured = advml.evaluate(model, images, labels, params=settings, overrides="evaluate.steps=1")
    assert measured.record["figures"]["accuracy/threat_model_2"]["steps"] == 1


def test_a_model_of_another_ball_than_that_of_the_evaluation_gets_a_remark(model, dataset, tmp_path):
    pairs = images_of(dataset.train), images_of(dataset.validation)
    quick = ["pretrain.SL.epochs=1", "attack.steps=1"]
    trained = advml.train("SL", "ST", *pairs[0], validation=pairs[1], params="digits", overrides=quick)
    trained.save(tmp_path)
    for network in (trained.model, advml.load_model(tmp_path)):
        remarks = advml.evaluate(network, *pairs[1], epsilon=0.1, overrides=QUICK).remarks
        assert len(remarks) == 1 and "0.15" in remarks[0] and "0.1" in remarks[0]
        assert advml.evaluate(network, *pairs[1], epsilon=0.15, overrides=QUICK).remarks == ()


def test_evaluate_and_train_refuse_labels_of_no_class_and_names_that_do_not_exist(model, dataset):
    images, labels = images_of(dataset.test)
    for asked, words in (
        (lambda: advml.evaluate(model, images, labels + 9), "label 12 is out of range"),
        (lambda: advml.evaluate(model, images), "labels are missing"),
        (lambda: advml.evaluate(model, images, labels, overrides=["worst_case.stepz=3"]), "did you mean steps"),
        (lambda: advml.evaluate(model, [(images[:3], labels[:4]), (images[4:8], labels[4:7])]), "batch 0: (3, 1, 8, 8) images, but (4,)"),
        (lambda: advml.evaluate(model, [(images, labels), (images[..., 1:], labels)]), "batch 1: images are (1, 8, 7)"),
        (lambda: advml.evaluate(model, images, labels, validation=(images, labels[1:])), "validation: labels must be one class per image"),
        (lambda: advml.evaluate(model, images, labels, params="cifar11"), "cifar11"),
        (lambda: advml.evaluate(model, images, labels, scheme="XL"), "scheme = 'XL'"),
        (lambda: advml.evaluate(model, images, labels, scheme="CL"), "projection head"),
        (lambda: advml.evaluate(model, images * 0.999, labels, corruptions=True), "256 grey levels"),
        (lambda: advml.evaluate(model, images, labels, validation=images), "validation: labels are missing"),
        (lambda: advml.train("SL", "ST", images, labels, validation=images), "validation: labels are missing"),
        (lambda: advml.train("SL", "ST", images, labels, validation=(images, labels), device="cudda"), "device = 'cudda'"),
        (lambda: advml.probe_layers(model, images, (images, labels), {}), "train: labels are missing"),
        (lambda: advml.train("CL", "FAT", images, labels, validation=(images, labels)), "regime = 'FAT'"),
        (lambda: advml.compare_layers(model, model, images, images[:20], batch_size=10), "40 images, but 20 other_images"),
        (lambda: advml.compare_layers(model, model, images[:3]), "CKA needs batches of 4"),
        (lambda: advml.compare_layers(model, model, images, layers=["conv9"]), "conv9"),
    ):
        with pytest.raises(UserError) as refused:
            asked()
        assert words in str(refused.value)


def test_an_epsilon_that_is_given_is_the_one_of_every_figure_whatever_the_settings_say(model, dataset):
    settings = [*QUICK, "evaluate.epsilon=0.3", "threat_model.epsilon=0.2"]
    measured = advml.evaluate(model, *images_of(dataset.test), epsilon=0.01, overrides=settings)
    assert measured.record["figures"]["accuracy/threat_model_2"]["epsilon"] == 0.01
    assert measured.record["figures"]["accuracy/worst_case"]["epsilon"] == 0.01


# Layers


def test_cka_of_a_layer_with_a_rotation_of_itself_is_one_and_images_may_come_in_batches(model, dataset):
    images, _ = images_of(dataset.test)
    turned = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4))
    with torch.no_grad():
        rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
        turned[2].weight.copy_(3 * rotation @ model[2].weight)
    compared = advml.compare_layers(model, turned, images, batch_size=20)
    assert compared.rows == compared.columns == ("0", "2") and abs(compared.matrix[1, 1] - 1) < 1e-4
    loader = DataLoader(TensorDataset(images), batch_size=20)
    assert np.array_equal(compared.matrix, advml.compare_layers(model, turned, loader).matrix)
    shuffled = advml.compare_layers(
        model, turned, images, images[torch.randperm(40, generator=torch.Generator().manual_seed(0))], batch_size=20
    )
    assert shuffled.matrix[1, 1] < 0.9
    assert repr(compared).startswith("LayerComparison(2 x 2 layers, 40 images, CKA ") and len(repr(compared)) < 100
    assert compared.plot(title="turned").get_suptitle() == "turned"


def test_a_probe_is_shown_in_a_line(model, dataset):
    split = images_of(dataset.test)
    probe = advml.probe_layers(model, split, split, {"clean": split}, layers=["2"])["2"]
    assert repr(probe).startswith(f"Probe(validation {probe.accuracy['validation']:.3f}, clean ") and len(repr(probe)) < 100


def test_foolbox_gives_the_same_images_under_the_parameters_that_the_guide_names(model, dataset):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # foolbox imports scipy.ndimage.filters
        from foolbox import PyTorchModel
        from foolbox.attacks import L2PGD, LinfPGD

    images, labels = images_of(dataset.test)
    peer = PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")
    for norm, attack, epsilon in (("linf", LinfPGD, 0.1), ("l2", L2PGD, 0.5)):
        _, theirs, _ = attack(abs_stepsize=0.04, steps=6, random_start=False)(peer, images, labels, epsilons=epsilon)
        settings = {"norm": norm, "epsilon": epsilon, "step_size": 0.04, "steps": 6, "random_start": False, "keep": "last"}
        torch.testing.assert_close(advml.attack(model, images, labels, **settings), theirs, atol=1e-5, rtol=0)
