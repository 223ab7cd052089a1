"""Names, order and aliases of layers, on small modules by hand and on timm's and torchvision's networks."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from advml.core.errors import UserError
from advml.similarity.layers import layers, left_out, watching


def images(count: int = 2, *, channels: int = 1, side: int = 32) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def names(network: nn.Module, *select: str, inputs: Tensor | None = None) -> list[str]:
    return [layer.name for layer in layers(network, images() if inputs is None else inputs, select=select or ("all",))]


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them in, and one of them is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.last = nn.Linear(6, 6)
        self.act = nn.Tanh()
        self.first = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.head(self.act(self.last(self.act(x))))


# Order, calls and aliases


def test_rows_are_in_execution_order_with_a_number_for_every_further_call():
    network, x = Backwards(), torch.randn(2, 6)
    assert names(network, inputs=x) == ["first", "act", "act#2", "last", "act#3", "head"]
    seen = {}
    rows = layers(network, x, select=["all"])
    with watching(network, rows, lambda number, output: seen.update({rows[number].name: output.clone()})) as run:
        for _ in range(2):  # counts start anew with every pass
            seen.clear()
            run(x)
    first = network.first(x)
    expected = {
        "first": first,
        "act": first.tanh(),
        "act#2": first.tanh().tanh(),
        "last": network.last(first.tanh().tanh()),
        "act#3": network.last(first.tanh().tanh()).tanh(),
        "head": network(x),
    }
    assert list(seen) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value)


def test_a_later_call_can_be_watched_alone():
    network, x, seen = Backwards(), torch.randn(4, 6), []
    rows = layers(network, x, select=["act#2"])
    with watching(network, rows, lambda number, output: seen.append((number, output.clone()))) as run:
        run(x)
    ((number, output),) = seen
    assert number == 0
    torch.testing.assert_close(output, network.first(x).tanh().tanh())


def test_a_module_registered_twice_is_one_that_is_called_twice():
    shared = nn.Linear(4, 4)
    assert names(nn.Sequential(shared, nn.Tanh(), shared), inputs=torch.randn(2, 4)) == ["0", "1", "0#2"]


def test_what_hands_on_its_input_is_an_alias_of_the_layer_that_made_it():
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Identity()), nn.Sequential(nn.ReLU()))
    rows = layers(network.train(), torch.randn(2, 4), select=["all"])  # dropout is off in the pass, whatever the mode
    assert [(row.name, row.aliases, row.kind, row.shape) for row in rows] == [
        ("1.0", ("1.1", "1.2", "1"), "Linear", (4,)),
        ("2.0", ("2",), "ReLU", (4,)),
    ]


@pytest.mark.parametrize("inplace", [True, False])
def test_an_in_place_layer_is_a_layer_of_its_own(inplace):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace), nn.Dropout(0.1), nn.Hardtanh(inplace=inplace))
    rows = layers(network, torch.randn(2, 4), select=["all"])
    assert [row.names for row in rows] == [("0",), ("1", "2"), ("3",)]


class InPlaceSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.identity = nn.Linear(4, 4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x += 1
        return self.identity(x)


def test_a_sum_in_place_is_not_mistaken_for_the_layer_before_it():
    network = nn.Sequential(InPlaceSum(), nn.Tanh())
    rows = layers(network, torch.randn(2, 4), select=["all"])
    assert [row.names for row in rows] == [("0.linear",), ("0.identity", "0"), ("1",)]


class Tuples(nn.Module):
    """Hands out all sorts: a pair, None, integers, a number per batch, a table without images, heads that are as many as images."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.nothing, self.whole, self.single, self.table, self.heads, self.good = (Gives() for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        self.pair((x, x))
        self.nothing(None)
        self.whole(x.argmax(1))
        self.single(x.mean())
        self.table(torch.ones(7, 4))
        self.heads(torch.ones(2, 3))  # of two images, one row each
        return self.good(2 * x)


class Gives(nn.Module):
    def forward(self, x: object) -> object:
        return x


def test_outputs_that_are_not_one_row_per_image_are_left_out():
    assert names(Tuples(), inputs=torch.randn(2, 4)) == ["pair:0", "good"]  # both parts of the pair are one tensor


def test_a_position_bias_of_two_heads_is_not_taken_for_two_images():
    """test_vit_relpos has two heads, and a table of biases for each."""
    network = timm.create_model("test_vit_relpos", num_classes=0, img_size=32)
    found = names(network, inputs=images(2, channels=3))
    assert found == names(network, inputs=images(5, channels=3)) and not [name for name in found if "rel_pos" in name]


# Blocks and heads


def rule(prefix: str, depths: list[int]) -> list[str]:
    return [prefix.format(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]


def children(module: nn.Module, name: str) -> list[str]:
    return [child for child, _ in module.get_submodule(name).named_children()]


BLOCKS = {
    "test_resnet": lambda encoder: [f"layer{stage}.{name}" for stage in (1, 2, 3, 4) for name in children(encoder, f"layer{stage}")],
    "test_convnext": lambda encoder: rule("stages.{}.blocks.{}", [len(stage.blocks) for stage in encoder.stages]),
    "test_vit": lambda encoder: [f"blocks.{block}" for block in range(len(encoder.blocks))],
    "test_efficientnet": lambda encoder: rule("blocks.{}.{}", [len(stage) for stage in encoder.blocks]),
    "efficientnet_b0": lambda encoder: rule("blocks.{}.{}", [len(stage) for stage in encoder.blocks]),
    "regnetx_002": lambda encoder: [f"s{stage}.{name}" for stage in (1, 2, 3, 4) for name in children(encoder, f"s{stage}")],
    "test_byobnet": lambda encoder: rule("stages.{}.{}", [len(stage) for stage in encoder.stages]),
}


@pytest.mark.parametrize("backbone", BLOCKS)
def test_blocks_of_ours_are_followed_by_the_encoder_and_the_heads(make_network, backbone):
    network = make_network(backbone=backbone, stem="native", image_size=32)
    blocks = [f"encoder.{name}" for name in BLOCKS[backbone](network.encoder)]
    rows = layers(network, images())
    assert [row.name for row in rows] == [*blocks, "encoder", "projection_head", "classifier"]
    assert [row.is_block for row in rows] == [True] * len(blocks) + [False] * 3
    assert [row.in_encoder for row in rows] == [True] * (len(blocks) + 1) + [False] * 2
    everything = layers(network, images(), select=["all"])
    assert sum(row.is_block for row in everything) == len(blocks)
    assert {name for row in rows for name in row.names} <= {name for row in everything for name in row.names}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_a_plain_timm_network_has_the_same_blocks(backbone):
    network = timm.create_model(backbone, num_classes=5, **({"img_size": 32} if "vit" in backbone else {}))
    rows = layers(network, images(channels=3))
    assert [row.name for row in rows] == BLOCKS[backbone](network) and all(row.in_encoder and row.is_block for row in rows)
    assert names(network, inputs=images(channels=3))[-1] == {"test_resnet": "fc", "test_vit": "head"}[backbone]


def test_torchvisions_resnet_calls_its_relu_twice():
    network = torchvision.models.resnet18()
    rows = layers(network, images(channels=3), select=["all"])
    order = [row.name for row in rows if row.name.startswith("layer2.0")]
    assert order == [f"layer2.0.{name}" for name in ("conv1", "bn1", "relu", "conv2", "bn2", "downsample.0", "downsample.1", "relu#2")]
    blocks = layers(network, images(channels=3))
    assert [row.name for row in blocks] == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert "layer2.0.relu#2" in blocks[2].names and blocks[2].kind == "BasicBlock"


def test_the_heads_that_there_are_are_recorded(make_network):
    assert names(make_network(projection_size=None), "blocks", inputs=images(side=8))[-2:] == ["encoder", "classifier"]
    assert names(make_network(classes=None), "blocks", inputs=images(side=8))[-2:] == ["encoder", "projection_head"]
    rows = layers(make_network(), images(side=8), select=["all"])
    assert [row.name for row in rows if not row.in_encoder] == [*(f"projection_head.{number}" for number in range(3)), "classifier"]
    assert [row.shape for row in rows if not row.in_encoder] == [(96,), (96,), (16,), (4,)]
    assert not [name for row in rows for name in row.names if name.startswith("normalize")]


def test_a_network_without_blocks_says_what_to_ask_for_instead():
    with pytest.raises(UserError, match=r"similarity\.layers = all"):
        names(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "blocks", inputs=torch.randn(2, 4))


# Patterns


@pytest.mark.parametrize("pattern", ["layer3.*", "encoder.layer3.*", "*.act2", "bn1", "layer[12].0", "classifier", "fc"])
def test_a_pattern_selects_by_name_or_alias_with_or_without_the_encoder_in_front(make_network, pattern):
    network = make_network()
    everything = layers(network, images(side=8), select=["all"])
    start, _, end = pattern.removeprefix("encoder.").partition("*")

    def is_meant(name: str) -> bool:
        plain = name.removeprefix("encoder.")
        if "[" in pattern:
            return plain in ("layer1.0", "layer2.0")
        return plain.startswith(start) and plain.endswith(end) if "*" in pattern else plain == pattern

    expected = [row.name for row in everything if any(map(is_meant, row.names))]
    assert 0 < len(expected) < len(everything) / 2
    assert names(network, pattern, inputs=images(side=8)) == expected


def test_several_words_are_joined_in_execution_order_without_repeats(make_network):
    network = make_network()
    found = names(network, "classifier", "blocks", "conv1", "layer2.0", inputs=images(side=8))
    assert found == ["encoder.conv1", *names(network, "blocks", inputs=images(side=8))]


@pytest.mark.parametrize(
    ("pattern", "close"), [("layr3.0.act1", "encoder.layer3.0.act1"), ("clasifier", "classifier"), ("zzz*", "encoder.conv1")]
)
def test_a_pattern_that_matches_nothing_is_an_error_that_names_close_layers(make_network, pattern, close):
    with pytest.raises(UserError, match="no layer matches") as raised:
        names(make_network(), "blocks", pattern, inputs=images(side=8))
    assert repr(pattern) in str(raised.value) and close in str(raised.value)


# Side effects


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def modes(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()]


def test_modes_statistics_and_hooks_are_restored(make_network):
    network = make_network().train()
    network.encoder.layer2.eval()
    before, statistics = modes(network), [buffer.clone() for buffer in network.buffers()]
    assert len(set(before)) == 2
    rows, seen = layers(network, images(side=8)), []
    with watching(network, rows, lambda number, output: seen.append((output.requires_grad, any(modes(network))))) as run:
        run(images(5, side=8))
    assert seen == [(False, False)] * len(rows)
    assert modes(network) == before and hooks(network) == 0
    assert all(map(torch.equal, network.buffers(), statistics))


def test_modes_and_hooks_are_restored_after_an_error(make_network):
    network = make_network().train()
    network.encoder.layer2.eval()
    before, rows = modes(network), layers(network, images(side=8))

    def see(number: int, output: Tensor) -> None:
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"), watching(network, rows, see) as run:
        run(images(side=8))
    assert modes(network) == before and hooks(network) == 0
    with pytest.raises(RuntimeError):
        layers(network, torch.rand(2, 7, 8, 8))
    assert modes(network) == before and hooks(network) == 0


def test_hooks_of_others_stay(make_network):
    network, calls = make_network(), []
    network.classifier.register_forward_hook(lambda *_: calls.append(1))
    layers(network, images(side=8))
    assert hooks(network) == 1 and calls


def test_an_identity_on_what_no_module_made_is_no_layer():
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.skip, self.last = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.skip(self.first(x) + x))

    assert [layer.name for layer in layers(Adds(), torch.randn(3, 4), select=["all"])] == ["first", "last"]


# Parts of outputs


def test_parts_of_tuples_and_dictionaries_are_layers_and_watched_by_name():
    """As of attention, whose weights are None, and of Hugging Face, whose outputs are dictionaries."""
    network = nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True))
    network.forward = lambda x: {"hidden": network[0](x, x, x)}
    x, seen = torch.randn(3, 5, 4), []
    rows = layers(network, x, select=["0"])
    assert [(row.name, row.shape) for row in rows] == [("0:0", (5, 4)), ("0:1", (5, 5))]
    with watching(network, rows, lambda number, output: seen.append(output.clone())) as run:
        run(x)
    for found, expected in zip(seen, network[0].eval()(x, x, x), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_has_no_value_for_each_image_is_named():
    assert left_out(Tuples(), torch.randn(2, 4)) == ["nothing", "whole", "single", "table", "heads"]
    assert left_out(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)) == []


def test_the_linear_layer_that_another_network_ends_in_is_not_of_the_encoder():
    rows = layers(torchvision.models.resnet18(), images(channels=3), select=["all"])
    assert [row.name for row in rows if not row.in_encoder] == ["fc"]
