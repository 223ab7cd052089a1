"""Networks: what they compute, what their seeds decide, and that a file gives back exactly what was saved."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import five_crop

import advml
from advml.core.errors import UserError
from advml.models.layers import DualBatchNorm, clean_statistics
from advml.models.network import Architecture, Network, build, is_whole, load, read_record, save, under_attack

ARCHITECTURE = Architecture("test_resnet", "small", {}, 3, 8, (0.1, 0.4, 0.6), (0.2, 0.3, 0.5), 10, 7, False, False)


def network(seed: int = 0, **changes) -> Network:
    return build(replace(ARCHITECTURE, **changes), seed=seed)


def pictures(count: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def same_weights(first: Network, second: Network) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# What a network computes


def test_images_are_normalised_per_channel_by_the_first_layer():
    model, images = network().eval(), pictures()
    mean, std = torch.tensor(ARCHITECTURE.mean).view(3, 1, 1), torch.tensor(ARCHITECTURE.std).view(3, 1, 1)
    assert torch.equal(model.features(images), model.encoder((images - mean) / std))
    assert torch.equal(model(images), model.classifier(model.encoder((images - mean) / std)))


def test_logits_are_of_unit_length_under_normalize_logits():
    images, raw = pictures(), network().eval()
    normalised = network(normalize_logits=True).eval()
    normalised.load_state_dict(raw.state_dict())
    torch.testing.assert_close(normalised(images).norm(dim=1), torch.ones(4))
    torch.testing.assert_close(normalised(images), F.normalize(raw(images), dim=1))
    assert (raw(images).norm(dim=1) - 1).abs().min() > 1e-3


def test_embeddings_are_of_unit_length_and_come_from_a_two_layer_head_without_batch_norm():
    model, images = network().eval(), pictures()
    first, second = model.projection_head[0], model.projection_head[2]
    expected = second(F.relu(first(model.features(images))))
    torch.testing.assert_close(model.embed(images), F.normalize(expected, dim=1))
    torch.testing.assert_close(model.embed(images).norm(dim=1), torch.ones(4))
    assert model.embed(images).shape == (4, 7) and first.out_features == first.in_features == model.width


def test_embeddings_are_of_unit_length_under_bf16_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = network().eval().embed(pictures())
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))


def test_a_network_has_only_the_heads_it_is_asked_for():
    assert network(classes=None).classifier is None
    assert network(projection_size=None).projection_head is None


# Seeds


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = network(seed=3)
    torch.manual_seed(2)
    assert same_weights(first, network(seed=3))
    assert not same_weights(first, network(seed=4))


def test_building_and_loading_a_network_leave_global_generators_alone(tmp_path, monkeypatch):
    before, reseeded = torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    model = network(classes=None)
    model.attach_classifier(5, seed=1)
    save(model, tmp_path, {})
    assert same_weights(load(tmp_path), model)
    assert torch.equal(torch.get_rng_state(), before) and reseeded == []


def test_an_attached_classifier_depends_on_its_seed_alone_and_is_recorded():
    first, second, third = (network(seed=seed, classes=None) for seed in (0, 1, 2))
    torch.rand(3)
    first.attach_classifier(5, seed=1)
    second.attach_classifier(5, seed=1)
    third.attach_classifier(5, seed=2)
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.classifier.weight, third.classifier.weight)
    assert first.architecture.classes == 5 and first(pictures()).shape == (4, 5)


# Dual batch norm


def dual() -> tuple[Network, list[DualBatchNorm]]:
    model = network(dual_batch_norm=True).train()
    return model, [module for module in model.modules() if isinstance(module, DualBatchNorm)]


def updates(layers: list[DualBatchNorm]) -> set[tuple[int, int]]:
    return {(int(layer.clean.num_batches_tracked), int(layer.adversarial.num_batches_tracked)) for layer in layers}


def test_every_batch_norm_becomes_dual():
    model, layers = dual()
    single = [module for module in network().modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(layers) == len(single) > 0
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == 2 * len(single)


def test_clean_batches_move_the_clean_statistics_and_all_others_the_adversarial_ones():
    model, layers = dual()
    with clean_statistics(model):
        model(pictures())
    assert updates(layers) == {(1, 0)}
    model(pictures())
    model(pictures())
    assert updates(layers) == {(1, 2)}


def test_inference_and_attacks_use_the_adversarial_statistics():
    model, _ = dual()
    with clean_statistics(model):
        model(pictures(seed=1))
    model(pictures(seed=2))
    model.eval()
    plain = network().eval()
    plain.load_state_dict({key.replace(".adversarial", ""): value for key, value in model.state_dict().items() if ".clean." not in key})
    assert torch.equal(model(pictures()), plain(pictures()))
    with under_attack(model):
        assert torch.equal(model(pictures()), plain(pictures()))
    with clean_statistics(model):
        assert not torch.equal(model(pictures()), plain(pictures()))


def test_clean_statistics_end_with_an_exception():
    model, layers = dual()
    with pytest.raises(ZeroDivisionError), clean_statistics(model):
        raise ZeroDivisionError
    assert not any(layer.use_clean for layer in layers)


def test_a_network_without_dual_batch_norm_ignores_clean_statistics():
    model = network().eval()
    with clean_statistics(model):
        inside = model(pictures())
    assert torch.equal(inside, model(pictures()))


# Files


def saved(folder: Path, **changes) -> Network:
    model = network(**changes).train()
    model.features(pictures())  # batch-norm statistics of their own
    model.to(memory_format=torch.channels_last)
    save(model, folder, {"classes": list("abcdefghij"), "epoch": 3})
    return model


@pytest.mark.parametrize(
    "changes", [{}, {"dual_batch_norm": True}, {"classes": None}, {"projection_size": None}, {"normalize_logits": True}]
)
def test_a_loaded_network_is_bit_for_bit_the_saved_one(tmp_path, changes):
    model = saved(tmp_path / "model", **changes)
    loaded = load(tmp_path / "model")
    assert same_weights(model, loaded) and loaded.architecture == model.architecture
    assert torch.equal(loaded.eval().features(pictures()), model.eval().to(memory_format=torch.contiguous_format).features(pictures()))


def test_the_record_keeps_what_it_was_given_and_adds_architecture_and_digest(tmp_path):
    model = network()
    digest = save(model, tmp_path, {"epoch": 3})
    record = read_record(tmp_path)
    assert digest == record["digest"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert record["epoch"] == 3 and record["architecture"]["backbone"] == "test_resnet"


def test_load_model_returns_the_classifier_in_eval_mode(tmp_path):
    model = saved(tmp_path).eval()
    loaded = advml.load_model(str(tmp_path))
    assert isinstance(loaded, torch.nn.Module) and not any(module.training for module in loaded.modules())
    torch.testing.assert_close(loaded(pictures()), model(pictures()))
    assert loaded(pictures()).shape == (4, 10)


def rewrite(folder: Path, change) -> None:
    """Damage the tensors in a way that every check of the file itself passes."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    edit_record(folder, digest=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def edit_record(folder: Path, **changes) -> None:
    record = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(record | changes))


def edit_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))


def edit_architecture(folder: Path, **changes) -> None:
    edit_record(folder, architecture=read_record(folder)["architecture"] | changes)


DAMAGES = {
    "a missing batch-norm statistic": lambda f: rewrite(f, lambda t: t.pop("encoder.bn1.running_mean")),
    "a renamed tensor": lambda f: rewrite(f, lambda t: t.update(weight=t.pop("classifier.weight"))),
    "an extra tensor": lambda f: rewrite(f, lambda t: t.update(extra=torch.zeros(1))),
    "a tensor of another shape": lambda f: rewrite(f, lambda t: t.update({"classifier.bias": torch.zeros(3)})),
    "a flipped bit": lambda f: edit_weights(f, lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]),
    "a truncated file": lambda f: edit_weights(f, lambda content: content[:-100]),
    "an empty file": lambda f: (f / "model.safetensors").write_bytes(b""),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no record": lambda f: (f / "model.json").unlink(),
    "a record that is no JSON": lambda f: (f / "model.json").write_text("{"),
    "a record that is no text": lambda f: (f / "model.json").write_bytes(b"\xff\xfe\x00"),
    "a record that is a list": lambda f: (f / "model.json").write_text("[]"),
    "a record without architecture": lambda f: (f / "model.json").write_text("{}"),
    "an architecture of null": lambda f: edit_record(f, architecture=None),
    "an architecture with an unknown key": lambda f: edit_architecture(f, colour=1),
    "an architecture of an unknown backbone": lambda f: edit_architecture(f, backbone="no_net"),
    "an architecture of another network": lambda f: edit_architecture(f, classes=11),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_stop_with_one_line(tmp_path, damage):
    saved(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as stopped:
        load(tmp_path)
    line = str(stopped.value)
    assert "\n" not in line and ("'no_net'" in line or (str(tmp_path) in line and "dvc" in line))


def test_a_folder_without_a_model_stops_with_its_path_and_the_remedy(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"contains no model.*dvc repro.*dvc pull") as stopped:
            advml.load_model(folder)
        assert str(folder) in str(stopped.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="contains no model"):
        load(tmp_path / "file")


def test_load_model_refuses_a_pretrained_encoder(tmp_path):
    saved(tmp_path, classes=None)
    with pytest.raises(UserError, match=r"pretrained encoder.* models/finetune$"):
        advml.load_model(tmp_path)


def test_a_network_whose_tensors_share_memory_is_saved(tmp_path):
    model = network()
    first, second, *_ = (module for module in model.encoder.modules() if isinstance(module, torch.nn.BatchNorm2d))
    second.weight = first.weight
    save(model, tmp_path, {})
    assert same_weights(load(tmp_path), model)


def test_a_folder_is_whole_only_with_the_weights_that_its_record_describes(tmp_path):
    assert not is_whole(tmp_path)
    saved(tmp_path)
    assert is_whole(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1])
    assert not is_whole(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert not is_whole(tmp_path)


def test_a_classifier_of_averaged_crops_sees_the_mean_features_of_centre_and_corners(make_network):
    network, images = make_network(), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network.eval()
    network.architecture = replace(network.architecture, averaged_crops=5)
    crops = [F.interpolate(crop, size=(8, 8), mode="bilinear", align_corners=False) for crop in five_crop(images, [6, 6])]
    expected = torch.stack([network.features(crop) for crop in crops]).mean(0)
    torch.testing.assert_close(network.classifier_features(images), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network(images), network.classify(expected), atol=1e-4, rtol=1e-4)
    images.requires_grad_()
    assert torch.autograd.grad(network(images).sum(), images)[0].abs().sum() > 0
