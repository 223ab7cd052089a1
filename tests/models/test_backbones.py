"""Backbones: small stems keep the resolution, and what cannot work says so in one line."""

from __future__ import annotations

import re
from pathlib import Path
from zlib import crc32

import pytest
import torch

from advml.core.errors import UserError
from advml.models.backbones import create_encoder, remark_on_stem

# One of each family; the second of a family has another kind of stem.
TABLE = Path(__file__).parents[2] / "docs" / "backbones.md"
SMALL = [
    "test_resnet",
    "resnet18d",
    "test_convnext",
    "convnext_atto_ols",
    "test_efficientnet",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "regnetx_002",
    "test_vit",
]


def encoder(backbone: str, *, stem: str = "small", channels: int = 1, image_size: int = 8, **options):
    return create_encoder(backbone, stem=stem, channels=channels, image_size=image_size, options=options)


def resolution_after_the_stem(backbone: str, *, channels: int, image_size: int) -> int:
    """Side of what the first block receives."""
    model, _ = encoder(backbone, channels=channels, image_size=image_size)
    sides = []
    first = next(getattr(model, name) for name in ("layer1", "stages", "s1", "blocks") if hasattr(model, name))
    first.register_forward_pre_hook(lambda module, inputs: sides.append(inputs[0].shape))
    with torch.no_grad():
        model.eval()(torch.zeros(1, channels, image_size, image_size))
    shape = sides[0]
    return shape[-1] if len(shape) == 4 else round(shape[1] ** 0.5)  # (N, C, H, W), or (N, tokens, C)


@pytest.mark.parametrize("backbone", [name for name in SMALL if name != "test_vit"])
@pytest.mark.parametrize(("channels", "image_size"), [(1, 8), (3, 32)])
def test_a_small_convolutional_stem_keeps_the_resolution(backbone, channels, image_size):
    assert resolution_after_the_stem(backbone, channels=channels, image_size=image_size) == image_size


@pytest.mark.parametrize(("image_size", "patches"), [(8, 8), (32, 8), (28, 14), (13, 13)])
def test_a_small_transformer_stem_leaves_at_least_8_by_8_patches(image_size, patches):
    model, _ = encoder("test_vit", image_size=image_size)
    assert model.patch_embed.grid_size == (patches, patches)


@pytest.mark.parametrize("backbone", SMALL)
def test_features_have_the_width_that_is_reported(backbone):
    model, width = encoder(backbone, channels=3)
    features = model.eval()(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (2, width)
    assert features[0].ne(features[1]).any()  # something of the images survives


def test_small_images_with_a_native_stem_are_remarked_on_where_a_small_one_exists():
    assert "model.stem = native" in remark_on_stem("resnet18", stem="native", image_size=32)
    for backbone, stem, size in (("resnet18", "small", 32), ("resnet18", "native", 64), ("swin_tiny_patch4_window7_224", "native", 32)):
        assert remark_on_stem(backbone, stem=stem, image_size=size) is None


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_a_native_stem_is_as_timm_builds_it(backbone):
    model, _ = encoder(backbone, stem="native", channels=3, image_size=32)
    if backbone == "test_resnet":
        assert isinstance(model.maxpool, torch.nn.MaxPool2d)
    else:
        assert model.patch_embed.patch_size == (16, 16)


def test_a_new_encoder_is_in_train_mode():
    model, _ = encoder("test_resnet")
    assert all(module.training for module in model.modules())


def test_options_reach_timm():
    model, _ = encoder("test_resnet", drop_rate=0.3)
    assert model.drop_rate == 0.3
    model, _ = encoder("test_vit", image_size=8, patch_size=4)
    assert model.patch_embed.patch_size == (4, 4)


# What cannot work


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as stopped:
        encoder(*args, **kwargs)
    assert len(str(stopped.value).splitlines()) == 1
    return str(stopped.value)


NATIVE, TAG = "vit_tiny_r_s16_p8_224", "resnet18.no_such_tag"
REFUSED = {  # backbone and options -> what the line names
    "an unknown name": (("resnet81", {}), ("model.backbone = 'resnet81'", "resnet18")),
    "a name like none": (("qqqq", {}), ("'qqqq'", "resnet18, convnext_atto")),
    "an unknown tag": ((TAG, {}), (f"model.backbone = '{TAG}'",)),
    "no small stem": (
        ("swin_tiny_patch4_window7_224", {"channels": 3, "image_size": 32}),
        ("swin_tiny_patch4_window7_224 (SwinTransformer)", "model.stem = native", "ResNet", "VisionTransformer"),
    ),
    "patches that a network cuts": ((NATIVE, {"image_size": 32}), (NATIVE, "model.stem = native")),
    "an option that timm does not know": (("test_resnet", {"dorp_rate": 0.1}), ("'test_resnet'", "model.options = {'dorp_rate': 0.1}")),
    "no vector per image": (("test_resnet", {"global_pool": ""}), ("not one vector per image",)),
}


@pytest.mark.parametrize(("given", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_built_is_one_line_that_names_it(given, named):
    message = refusal(given[0], **given[1])
    assert all(words in message for words in named)


@pytest.mark.parametrize(
    ("backbone", "image_size"),
    [("test_vit", 8), ("inception_v3", 8), ("halonet26t", 64)],
)
def test_images_that_a_network_does_not_survive_are_refused(backbone, image_size):
    with torch.device("meta"):  # without memory and arithmetic
        message = refusal(backbone, stem="native", channels=3, image_size=image_size)
        assert f"model.backbone = {backbone!r}" in message and "native" in message and f"3 x {image_size} x {image_size}" in message
        assert encoder(backbone, stem="native", channels=3, image_size=int(re.search(r"data.image_size = (\d+)", message)[1]))


@pytest.mark.parametrize(
    "options",
    [{"act_layer": "foo"}, {"layers": []}, {"block": "x"}, {1: 2}, {"model_name": "x"}, {"stem_width": 10**12}],
)
def test_options_that_timm_takes_and_fails_with_are_named(options):
    with pytest.raises(UserError) as stopped:
        create_encoder("test_resnet", stem="small", channels=1, image_size=8, options=options)
    message = str(stopped.value)
    assert f"model.options = {options}" in message and "it can be built without model.options" in message and "\n" not in message


@pytest.mark.parametrize(
    ("backbone", "sizes"),
    [("swin_tiny_patch4_window7_224", (32, 100)), ("deit_tiny_distilled_patch16_224", (64,)), ("twins_svt_small", (32,))],
)
def test_networks_that_timm_builds_for_a_size_are_built_for_the_datas(backbone, sizes):
    with torch.device("meta"):
        for size in sizes:
            model, width = encoder(backbone, stem="native", channels=3, image_size=size)
            assert model(torch.zeros(2, 3, size, size)).shape == (2, width)


@pytest.mark.parametrize(
    "option", ["checkpoint_path", "pretrained", "pretrained_cfg", "num_classes", "in_chans", "img_size", "features_only"]
)
def test_an_option_that_is_set_elsewhere_is_refused(option):
    message = refusal("test_resnet", **{option: "x.pth"})
    assert message.startswith(f"model.options.{option} = 'x.pth' is refused: ") and message.endswith("; leave it out")


# The table in docs/backbones.md, which docs/backbones.py writes in an hour


def rows() -> list[list[str]]:
    """module, network, a cell for each size, remarks."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def sampled() -> list[tuple[str, int, str]]:
    """One cell in 24 or so, by a hash."""
    head, *others = rows()
    cells = [(row[1], int(size), cell) for row in others for size, cell in zip(head[2:-1], row[2:-1], strict=True)]
    return [(network, size, cell) for network, size, cell in cells if crc32(f"{network} {size}".encode()) % 24 == 0]


def test_the_table_has_all_families_and_no_network_that_dies():
    _, *others = rows()
    assert len({row[0] for row in others}) >= 90
    assert not [row for row in others if re.search("DIES|WRONG", " ".join(row))]


@pytest.mark.parametrize(("backbone", "size", "cell"), sampled())
def test_the_table_tells_which_sizes_a_network_takes(backbone, size, cell):
    """On the meta device, without memory and arithmetic."""
    with torch.device("meta"):
        if cell == "yes":
            encoder(backbone, stem="native", channels=3, image_size=size)
        else:
            assert f"data.image_size = {cell};" in refusal(backbone, stem="native", channels=3, image_size=size)
