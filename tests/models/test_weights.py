"""Weights under other names: a prefix is stripped, what does not fit is refused by name, and a pickle is never opened."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from advml.core.errors import UserError
from advml.models.weights import fill, prefix_of, read


def network(*, classes: int = 3) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    net.add_module("fc", nn.Linear(4, classes))
    return net


SOURCE = {name: torch.rand(value.shape) if value.ndim else value + 5 for name, value in network().state_dict().items()}


def written(tensors: dict[str, Tensor], folder) -> bytes:
    save_file(tensors, folder / "w.safetensors")
    return read(folder / "w.safetensors")


PREFIXES = ("", "module.", "encoder.", "model.", "backbone.", "module.model.", "state_dict.", "state_dict.module.encoder.", "fc.", "net.0.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_stripped_and_told(tmp_path, prefix):
    net = network()
    assert fill(net, written({prefix + name: value for name, value in SOURCE.items()}, tmp_path)) == prefix
    assert all(torch.equal(value, SOURCE[name]) for name, value in net.state_dict().items())


def test_a_head_beside_a_prefixed_encoder_is_taken_where_every_name_is_accounted_for(tmp_path):
    tensors = {name if name.startswith("fc.") else f"backbone.{name}": value for name, value in SOURCE.items()}
    net = network()
    assert fill(net, written(tensors, tmp_path)) == "backbone."
    assert all(torch.equal(value, SOURCE[name]) for name, value in net.state_dict().items())


def test_counts_of_batches_may_be_missing(tmp_path):
    net = network()
    assert (
        fill(net, written({f"module.{name}": value for name, value in SOURCE.items() if "num_batches" not in name}, tmp_path)) == "module."
    )
    assert torch.equal(net[0].weight, SOURCE["0.weight"])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"fc.weight": None, "fc.bias": None}, ("lacks fc.weight, fc.bias",)),
        ({"fc.weight": None, "head.weight": torch.zeros(3, 4)}, ("head.weight", "lacks fc.weight")),
        ({f"ema.{number}": torch.zeros(1) for number in range(5)}, ("beyond the network ema.0, ema.1, ema.2 and 2 more",)),
        ({"fc.weight": torch.zeros(7, 4)}, ("fc.weight (7, 4) for (3, 4)",)),
    ],
    ids=["no head", "another head", "something more", "more classes"],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_does_not_fit_is_refused_by_name_and_the_network_stays(tmp_path, change, parts, prefix):
    tensors = {prefix + name: value for name, value in (SOURCE | change).items() if value is not None}
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError) as stopped:
        fill(net, written(tensors, tmp_path))
    assert all(part in str(stopped.value).replace(f"{prefix}head", "head") for part in parts) and (prefix in str(stopped.value))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_names_that_occur_with_and_without_the_prefix_are_refused(tmp_path):
    tensors = {f"module.{name}": value for name, value in SOURCE.items()} | {"fc.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"with and without"):
        fill(network(), written(tensors, tmp_path))


def test_only_whole_parts_of_a_name_are_cut_off():
    assert prefix_of(["submodule.w"], ["module.w"]) == ""
    assert prefix_of(["a.b.w", "a.b.v"], ["w", "v", "b.w"]) == "a.b."


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.ckpt", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_not_opened_and_the_way_to_convert_it_is_told(tmp_path, name, zipped):
    torch.save(Bomb(), tmp_path / name, _use_new_zipfile_serialization=zipped) if zipped else (tmp_path / name).write_bytes(
        pickle.dumps(Bomb())
    )
    with pytest.raises(UserError) as stopped:
        read(tmp_path / name)
    assert f"advml import {tmp_path / name} --backbone" in str(stopped.value)


def test_anything_else_is_one_line(tmp_path):
    (tmp_path / "w.txt").write_text("hello")
    with pytest.raises(UserError, match=r"w.txt is not a safetensors file"):
        read(tmp_path / "w.txt")
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        read(tmp_path / "none.safetensors")
