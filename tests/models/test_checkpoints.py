"""Published checkpoints: each layout gives the network's own logits, and a tensor that there is no use for is refused by name."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from advml.core.errors import UserError
from advml.models.checkpoints import read_checkpoint
from advml.models.importing import network_of
from advml.models.layers import clean_statistics
from advml.models.network import Architecture, Network, build

OPTIONS = {"channels": [4, 6, 8, 10]}  # a narrow ResNet-18, with the names of a usual one
CLASSES = 5


def source(*, stem: str = "small", two: bool = False, mean: float = 0.0, std: float = 1.0) -> Network:
    """A network whose weights and statistics are all different, in eval mode."""
    usual = {"options": OPTIONS, "channels": 3, "image_size": 8, "projection_size": 6, "normalize_logits": False}
    constants = {"mean": (mean,) * 3, "std": (std,) * 3}
    network = build(Architecture("resnet18", stem, classes=CLASSES, dual_batch_norm=two, **usual, **constants), seed=1)
    generator = torch.Generator().manual_seed(2)
    for value in network.encoder.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) + 0.5) if value.ndim == 1 else None
    return network.eval()


def named(network: Network, *changes: tuple[str, str], prefix: str = "", fc: str | None = "fc") -> dict[str, Tensor]:
    """The encoder's weights with parts of their names replaced, and the classifier under the name `fc`."""
    found = {}
    for name, value in network.encoder.state_dict().items():
        for ours, theirs in changes:
            name = name.replace(ours, theirs)
        found[prefix + name] = value
    return found | ({f"{fc}.{key}": value for key, value in network.classifier.state_dict().items()} if fc else {})


CIFAR = ("downsample.", "shortcut.")
HEAD = {"0.weight": torch.zeros(10, 10), "0.bias": torch.zeros(10), "2.weight": torch.zeros(6, 10), "2.bias": torch.zeros(6)}


def head(name: str) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in HEAD.items()}


def imported(tensors: dict[str, Tensor], **how: object) -> tuple[Network, object]:
    network, converted = network_of(tensors, file=Path("w.pth"), backbone="resnet18", image_size=8, options=OPTIONS, **how)
    return network.eval(), converted


IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
BRANCHES = ((".clean.", ".bn_list.0."), (".adversarial.", ".bn_list.1."))
ROBUST = (("downsample.0.", "downsample.conv."), ("downsample.1.", "downsample.bn."), *BRANCHES)
# Layout -> (what it was made from, what the file holds, its prefix, whether it has a classifier, what is left out)
LAYOUTS = {
    "torchvision": lambda: (one := source(stem="native"), named(one), "", True, set()),
    "DataParallel": lambda: (
        one := source(),
        {"state_dict": named(one, prefix="module.", fc="module.fc"), "epoch": 3},
        "module.",
        True,
        set(),
    ),
    "SupContrast": lambda: (
        one := source(),
        {
            "opt": argparse.Namespace(epochs=3),
            "model": named(one, CIFAR, prefix="encoder.module.", fc=None) | head("head"),
            "optimizer": {"state": {}},
        },
        "encoder.module.",
        False,
        set(head("head")),
    ),
    "RobustSSL": lambda: (
        one := source(two=True),
        {"state_dict": named(one, *ROBUST, prefix="module.encoder_q.", fc=None) | head("module.projection_head")},
        "module.encoder_q.",
        False,
        set(head("module.projection_head")),
    ),
    "MadryLab/robustness": lambda: (
        one := source(stem="native", mean=0.5, std=0.25),
        {
            "model": named(one, prefix="module.model.", fc="module.model.fc")
            | named(one, prefix="module.attacker.model.", fc="module.attacker.model.fc")
            | {
                f"module.{part}.new_{name}": torch.full((3, 1, 1), value)
                for part in ("normalizer", "attacker.normalize")
                for name, value in {"mean": 0.5, "std": 0.25}.items()
            },
            "epoch": 9,
        },
        "module.model.",
        True,
        {name.replace("module.", "module.attacker.", 1) for name in named(one, prefix="module.model.", fc="module.model.fc")},
    ),
    "RobustBench": lambda: (
        one := source(mean=0.5, std=0.25),
        named(one, CIFAR, fc="linear") | {"mu": torch.full((1, 3, 1, 1), 0.5), "sigma": torch.full((1, 3, 1, 1), 0.25)},
        "",
        True,
        set(),
    ),
    "solo-learn": lambda: (
        one := source(),
        {"state_dict": named(one, prefix="backbone.", fc="classifier") | head("projector"), "global_step": 7},
        "backbone.",
        True,
        set(head("projector")),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*numpy.*")
def test_a_published_layout_gives_equal_logits_and_features(layout, tmp_path):
    one, content, prefix, classifies, left_out = LAYOUTS[layout]()
    torch.save(content, tmp_path / "w.pth")
    network, converted = imported(read_checkpoint(tmp_path / "w.pth"))
    assert converted.prefix == prefix and set(converted.left_out) == left_out
    assert network.architecture.stem == one.architecture.stem and network.architecture.mean == one.architecture.mean
    with torch.no_grad():
        assert torch.equal(network.features(IMAGES), one.features(IMAGES))
        assert (network.classifier is not None) == classifies
        if classifies:
            assert torch.equal(network(IMAGES), one(IMAGES))
        if one.architecture.dual_batch_norm:
            with clean_statistics(network), clean_statistics(one):
                assert torch.equal(clean := network.features(IMAGES), one.features(IMAGES))
            assert not torch.allclose(clean, network.features(IMAGES))


FAULTS = {
    "a missing batch norm": (
        {"module.layer2.0.bn1.weight": None, "module.layer2.0.bn1.bias": None},
        "lacks layer2.0.bn1.weight (nearest: layer",
    ),
    "missing statistics": ({"module.bn1.running_mean": None}, "lacks bn1.running_mean"),
    "a wrong shape": ({"module.layer1.0.conv1.weight": torch.zeros(4, 4, 5, 5)}, "layer1.0.conv1.weight (4, 4, 5, 5) for (4, 64, 3, 3)"),
    "a stray key": ({"module.layer1.0.conv3.weight": torch.zeros(1)}, "module.layer1.0.conv3.weight (nearest: layer1.0.conv"),
    "another copy": ({"ema.conv1.weight": torch.ones(4, 3, 3, 3)}, "there is no use for ema.conv1.weight"),
    "another head": ({"module.model.fc.weight": torch.ones(5, 10)}, "there is no use for module.model.fc.weight"),
    "two classifiers": ({"linear.weight": torch.zeros(5, 10)}, "fc and linear could both"),
    "two normalisations": ({name: torch.rand(3) for name in ("mu", "sigma", "norm.mean", "norm.std")}, "normalisations mu, norm.mean"),
    "grey levels": ({"mu": torch.full((3,), 120.0), "sigma": torch.full((3,), 60.0)}, "120"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_accounted_for_is_refused_by_name(fault):
    changes, told = FAULTS[fault]
    tensors = named(source(), prefix="module.", fc="module.fc") | changes
    with pytest.raises(UserError) as stopped:
        imported({name: value for name, value in tensors.items() if value is not None})
    assert told in str(stopped.value)


def test_four_stray_keys_are_three_and_a_count():
    with pytest.raises(UserError, match=r"for a\.w, b\.w, c\.w and 1 more"):
        imported(named(source()) | {f"{name}.w": torch.zeros(1) for name in "abcd"})


def test_what_is_asked_for_is_left_out_and_listed():
    one = source()
    tensors = named(one, prefix="module.encoder_q.") | {f"module.encoder_k.{key}": value + 1 for key, value in named(one, fc=None).items()}
    network, converted = imported(tensors, without=("module.encoder_k.*",))
    assert len(converted.left_out) == len(named(one, fc=None)) and torch.equal(network(IMAGES), one(IMAGES))


def test_a_normalisation_that_contradicts_the_file_is_refused():
    from advml.models.normalization import KNOWN

    tensors = named(source()) | {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)}
    with pytest.raises(UserError, match="leave out --mean and --std"):
        imported(tensors, given=KNOWN["cifar10"])
    network, _ = imported(named(source()), given=KNOWN["cifar10"])
    assert network.architecture.mean == KNOWN["cifar10"].mean


def test_stems_of_equal_shapes_must_be_told_apart():
    encoder = build(
        Architecture("test_efficientnet", "native", {}, 3, 32, (0.0,) * 3, (1.0,) * 3, None, None, False, False), seed=0
    ).encoder.state_dict()
    with pytest.raises(UserError, match="--stem small or --stem native"):
        network_of(encoder, file=Path("w"), backbone="test_efficientnet", image_size=32)
    assert network_of(encoder, file=Path("w"), backbone="test_efficientnet", image_size=32, stem="native")


def test_safetensors_are_read_as_well(tmp_path):
    save_file(named(source()), tmp_path / "w.safetensors")
    assert read_checkpoint(tmp_path / "w.safetensors").keys() == named(source()).keys()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle ran code",))


@pytest.mark.parametrize(
    "content", [Bomb(), {"state_dict": {"w": torch.zeros(1)}, "callback": Bomb()}, nn.Linear(1, 1)], ids=["bomb", "beside", "module"]
)
def test_no_code_of_a_pickle_runs(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"does not contain weights only"):
        read_checkpoint(tmp_path / "w.pth")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"does not contain weights only"):
        read_checkpoint(tmp_path / "raw.pkl")


@pytest.mark.parametrize(
    "content", [torch.zeros(3), {"epoch": 3}, {"state_dict": {"w": torch.zeros(1), "n": 3}}], ids=["tensor", "empty", "number"]
)
def test_what_holds_no_named_weights_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth (contains|has)"):
        read_checkpoint(tmp_path / "w.pth")
