"""`model.init`: a pretraining starts from any encoder that fits, of another study or imported, and notices when it is exchanged."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from advml import config
from advml.core.errors import UserError
from advml.data import prepared
from advml.models import network
from advml.pipeline.repro import check_starting_points
from advml.pipeline.stages import evaluate, finetune, pretrain


@pytest.fixture(scope="module")
def first(new_study, tmp_path_factory):
    """CL, pretrained under attack in a study of its own."""
    study = new_study(tmp_path_factory.mktemp("first") / "study", "pretrain.CL.epochs=1")
    pretrain.run(study.context(), scheme="CL", phase="at", seed=0)
    return study.workspace.pretrained("CL-at-s0")


@pytest.fixture
def second(make_study, dataset):
    """A study of other images, with another mean, of as many classes by other names."""
    study = make_study("second")
    splits = {name: replace(split, images=255 - split.images) for name, split in dataset.splits.items()}
    classes = ("ant", "bee", "cat", "dog")
    other = replace(dataset, **splits, classes=classes, digest=prepared.digest(splits, classes), mean=(0.3,), std=(0.2,))
    shutil.rmtree(study.workspace.prepared)
    prepared.save(other, study.workspace.prepared)
    return study


def encoder(folder):
    return {name: value for name, value in load_file(folder / "model.safetensors").items() if name.startswith(("encoder", "normalize"))}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_pretrain_on_one_data_set_and_fine_tune_on_another(first, second):
    context = second.context(f"model.init={first}", "pretrain.CL.epochs=0")
    record = pretrain.run(context, scheme="CL", phase="at", seed=0)
    folder = second.workspace.pretrained("CL-at-s0")
    assert same(encoder(folder), encoder(first))  # the normalisation, too: the encoder knows no other
    assert record["init"] == {"digest": network.read_record(first)["digest"], "taken": ["encoder", "normalization", "projection_head"]}
    made = finetune.run(context, scheme="CL", regime="Full-AT", seed=0)
    assert made["pretraining"]["digest"] == record["digest"] and made["classes"] == ["ant", "bee", "cat", "dog"]
    assert not same(encoder(second.workspace.model("CL-Full-AT-s0")), encoder(first))


def test_a_pretraining_goes_on_from_there_whatever_its_seed(first, second):
    plain, started = second.context(), second.context(f"model.init={first}")
    (random,) = {pretrain.run(plain, scheme="SL", phase="st", seed=0)["digest"]}
    record = pretrain.run(started, scheme="SL", phase="st", seed=0)
    assert record["digest"] != random and record["init"]["taken"] == ["encoder", "normalization"]
    assert pretrain.run(started, scheme="SL", phase="st", seed=0)["digest"] == record["digest"]


def test_an_exchanged_file_is_noticed(first, second, tmp_path):
    first = shutil.copytree(first, tmp_path / "CL-at-s0")
    context = second.context(f"model.init={first}", "pretrain.CL.epochs=0")
    record = pretrain.run(context, scheme="CL", phase="at", seed=0)
    check_starting_points(context.config, second.workspace)
    assert pretrain.run(context, scheme="CL", phase="at", seed=0, reuse=True)["digest"] == record["digest"]
    changed = network.load(first)
    with torch.no_grad():
        changed.encoder.bn1.weight.mul_(2)
    network.save(changed, first, network.read_record(first))
    for noticing in (
        lambda: check_starting_points(context.config, second.workspace),
        lambda: finetune.run(context, scheme="CL", regime="AT", seed=0),
    ):
        with pytest.raises(UserError, match=r"model\.init = .*pretrain_at@CL-0"):
            noticing()
    assert pretrain.run(context, scheme="CL", phase="at", seed=0, reuse=True)["digest"] != record["digest"]
    check_starting_points(context.config, second.workspace)


def test_a_plain_file_of_weights_will_do(first, second, tmp_path, capsys):
    weights = {key.removeprefix("encoder."): value for key, value in encoder(first).items() if "normalize" not in key}
    save_file({f"module.{key}": value for key, value in weights.items()}, tmp_path / "w.safetensors")
    context = second.context(f"model.init={tmp_path / 'w.safetensors'}", "pretrain.CL.epochs=0")
    assert pretrain.run(context, scheme="CL", phase="st", seed=0)["init"]["taken"] == ["encoder"]
    assert "has no normalisation" in capsys.readouterr().err
    folder = second.workspace.pretrained("CL-st-s0")
    assert network.read_record(folder)["architecture"]["mean"] == [0.3]
    finetune.run(context, scheme="CL", regime="ST", seed=0)
    found = evaluate.run(context, scheme="CL", regime="ST", seed=0)
    assert "accuracy/threat_model_2" in found and "accuracy/threat_model_1" not in found


@pytest.mark.parametrize("batch_norm", ["single", "dual"])
def test_branches_are_doubled_or_the_adversarial_one_is_taken(make_network, study, tmp_path, batch_norm):
    other = {"single": True, "dual": False}[batch_norm]
    one = make_network(seed=4, dual_batch_norm=other)
    with torch.no_grad():
        for name, value in one.encoder.state_dict().items():
            value.add_(1 if ".clean." in name and name.endswith("weight") else 0)
    network.save(one, tmp_path / "one", {"name": "one"})
    context = study.context(f"model.init={tmp_path / 'one'}", "pretrain.CL.epochs=0", f"model.batch_norm={batch_norm}")
    pretrain.run(context, scheme="CL", phase="at", seed=0)
    images = context.dataset.test.images.float() / 255
    with torch.no_grad():
        assert torch.equal(network.load(study.workspace.pretrained("CL-at-s0")).eval().features(images), one.eval().features(images))


def test_a_classifier_is_taken_where_it_tells_the_same_classes_apart(make_network, study, second, tmp_path, dataset):
    network.save(make_network(seed=4, projection_size=None), tmp_path / "one", {"name": "one", "classes": list(dataset.classes)})
    options = f"model.init={tmp_path / 'one'}", "pretrain.SL.epochs=0"
    record = pretrain.run(study.context(*options), scheme="SL", phase="st", seed=0)
    assert record["init"]["taken"] == ["encoder", "normalization", "classifier"]
    with pytest.raises(UserError, match=r"pretrain\.SL\.epochs = 0 .* ant, bee"):
        pretrain.run(second.context(*options), scheme="SL", phase="st", seed=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.stem=native", r"model\.stem = 'native', but model\.init .* 'small'"),
        ("model.backbone=resnet10t", r"model\.backbone = 'resnet10t'"),
        ("model.init=nowhere", r"model\.init = nowhere cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(first, second, change, told):
    with pytest.raises(UserError, match=told):
        pretrain.run(second.context(f"model.init={first}", change), scheme="CL", phase="at", seed=0)


def test_no_epochs_need_an_encoder(study):
    for keys in (["pretrain.CL.epochs=0"], ["regimes.ST.epochs=0", "model.init=x"]):
        with pytest.raises(UserError, match=r"epochs = 0"):
            config.load(study.params, keys)
