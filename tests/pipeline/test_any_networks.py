"""Networks from anywhere against one another: by function, by timm name, ours, on photos or on the prepared images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

from advml.core.errors import UserError
from advml.models.network import save
from advml.pipeline.any_networks import run
from advml.pipeline.stages.compare import are_alike

MODELS = """
import timm, torch
from torchvision.models import VisionTransformer

def vit():
    torch.manual_seed(0)
    return VisionTransformer(image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=7)

def convnext():
    torch.manual_seed(0)
    return timm.create_model("test_convnext", num_classes=3)

class Pool(torch.nn.Module):
    def forward(self, hidden):
        return {"pooled": (hidden.mean(1), None), "places": torch.arange(len(hidden))}

class Windows(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.pool = torch.nn.Conv2d(1, 4, 4, 4), Pool()
        self.windows, self.head = torch.nn.Tanh(), torch.nn.Linear(4, 5)
    def forward(self, images):
        hidden = self.embed(images).flatten(2).mT
        self.windows(hidden.reshape(-1, 2, 4))
        return {"logits": self.head(self.pool(hidden)["pooled"][0])}

def deaf():
    class Deaf(torch.nn.Module):
        def forward(self, images):
            raise RuntimeError("no images for me")
    return Deaf()

def nothing():
    raise OSError("no weights here")
"""


@pytest.fixture
def place(study, make_network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study with a model of ours, a module of functions, and 24 photos of several sizes and kinds."""
    monkeypatch.chdir(tmp_path)
    module = f"models_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(MODELS)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    random = np.random.default_rng(0)
    for number in range(24):
        side = 20 + number
        pixels = random.integers(0, 255, (3, 3, 3), dtype=np.uint8)
        folder = tmp_path / "photos" / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels).resize((side, 2 * side), Image.Resampling.BICUBIC)
        image.convert("L" if number == 3 else "RGB").save(folder / f"{number}.png")
    context = study.context()
    about = {"input": list(context.dataset.shape), "classes": list(context.dataset.classes), "data": {"digest": context.dataset.digest}}
    save(make_network(), study.workspace.model("CL-AT-s0"), about)
    return Path(module)


def names(folder: Path) -> dict[str, list[str]]:
    described = json.loads((folder / "cka.json").read_text())
    return {model: [row["name"] for row in rows] for model, rows in described["layers"].items()}


def test_a_transformer_a_convnext_and_one_of_ours_are_compared_on_photos(study, place, tmp_path, capsys):
    context = study.context("similarity.layers=blocks", "similarity.measures=[cka, rsa, shape]")
    out = tmp_path / "out"
    compared = run(
        context, [f"{place}:vit", f"{place}:convnext", "CL-AT-s0"], images=tmp_path / "photos", mean="imagenet", std=None, out=out
    )
    vit, convnext = f"{place}-vit", f"{place}-convnext"
    assert [(panel.first, panel.second) for panel in compared.panels] == [(vit, convnext), (vit, "CL-AT-s0"), (convnext, "CL-AT-s0")]
    assert compared.kinds == ("clean",)
    for panel in compared.panels:
        for measure in ("cka", "rsa", "shape"):
            found = compared.matrix(panel, "clean", measure=measure)
            assert found.shape == tuple(len(names(out)[model]) for model in (panel.first, panel.second))
            assert np.isfinite(found).mean() > 0.5 and np.nanmax(np.abs(found)) <= 1
    networks = json.loads((out / "cka.json").read_text())["networks"]
    assert [about["input"] for about in networks.values()] == [[3, 16, 16], [3, 160, 160], [1, 8, 8]]
    assert networks[vit]["normalised"][0] == pytest.approx([0.485, 0.456, 0.406]) and networks["CL-AT-s0"]["normalised"] is None
    assert {path.name for path in out.glob("*.png")} == {"clean.png", "clean-rsa.png", "clean-shape.png", "map.png"}
    assert compared.distances.shape == (3, 3) and compared.distance == "shape"


def test_attention_of_torchvision_is_looked_into_by_pattern(study, place, tmp_path):
    run(
        study.context("similarity.layers=['*self_attention']"),
        [f"{place}:vit"],
        images=tmp_path / "photos",
        mean=None,
        std=None,
        out=tmp_path,
    )
    (found,) = names(tmp_path).values()
    assert found == [f"encoder.layers.encoder_layer_{block}.self_attention:0" for block in range(2)]


def test_dictionaries_and_tuples_are_looked_into_and_what_is_left_out_is_said(study, place, tmp_path, capsys):
    """On the prepared images, which it takes as they are."""
    compared = run(study.context("similarity.layers=all"), [f"{place}:Windows"], images=None, mean=None, std=None, out=tmp_path)
    (found,) = names(tmp_path).values()
    assert found == ["embed", "pool:pooled:0", "head"]
    assert "windows" in capsys.readouterr().err
    (counted,) = compared.counted.values()
    assert not counted[-1] and counted[:-1].all()  # the classifier is not of the encoder
    assert compared.panels[0].first == compared.panels[0].second


def test_a_timm_name_has_its_weights_behind_an_equals_sign(study, place, tmp_path):
    network = timm.create_model("test_resnet", num_classes=6, in_chans=1)
    safetensors.torch.save_file({f"module.{key}": value for key, value in network.state_dict().items()}, tmp_path / "w.safetensors")
    target = f"test_resnet={tmp_path / 'w.safetensors'}"
    run(study.context("similarity.layers=blocks"), [target, f"{place}:convnext"], images=None, mean="0.2", std="0.7", out=tmp_path / "out")
    networks = json.loads((tmp_path / "out" / "cka.json").read_text())["networks"]
    expected = [sum(network.default_cfg[key]) / 3 for key in ("mean", "std")]  # its own, not those of functions
    assert [values for (values,) in networks["test_resnet-w"]["normalised"]] == pytest.approx(expected)
    assert networks["test_resnet-w"]["input"][0] == 1 and len(networks["test_resnet-w"]["normalised"][0]) == 1


def test_the_network_sees_its_images_normalised_and_of_its_size(study, place, tmp_path):
    """The CKA of its first layer is that of the same convolution on images scaled and normalised by hand."""
    from advml.models.external import view

    found = view(f"{place}:Windows", study.workspace, shape=(1, 8, 8), mean="0.25", std="0.5", device=torch.device("cpu"))
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(found.prepared(images), (images - 0.25) / 0.5)
    assert found.shape == (1, 8, 8) and isinstance(found.network, nn.Module) and not found.network.training


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("deaf", "no images for me"),
        ("nothing", "no weights here"),
        ("absent", "absent"),
        ("test_resnet=absent.safetensors", "absent.safetensors"),
        ("no_such_net=w.safetensors", "no_such_net"),
        ("CL-XX", "CL-XX"),
    ],
)
def test_a_network_that_cannot_be_had_is_one_line(study, place, tmp_path, target, told):
    given = target if "=" in target or target.startswith("CL") else f"{place}:{target}"
    with pytest.raises(UserError, match=told) as refused:
        run(study.context(), [given], images=None, mean=None, std=None, out=tmp_path / "out")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_too_few_photos_and_names_that_are_one_are_refused(study, place, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--images .*empty contains 0 images"):
        run(study.context(), [f"{place}:vit"], images=tmp_path / "empty", mean=None, std=None, out=tmp_path / "out")
    with pytest.raises(UserError, match="different names"):
        run(study.context(), ["CL-AT-s0"] * 2, images=None, mean=None, std=None, out=tmp_path / "out")


def test_a_photo_that_cannot_be_read_is_named_and_left_out(study, place, tmp_path, capsys):
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no picture")
    compared = run(
        study.context("similarity.layers=blocks"), ["CL-AT-s0"], images=tmp_path / "photos", mean=None, std=None, out=tmp_path / "out"
    )
    assert sum(compared.similarity.sizes) == 24 and "broken.jpg" in capsys.readouterr().err


def test_models_of_the_study_alone_are_attacked(study, place):
    assert are_alike(study.context(), ["CL-AT-s0", str(study.workspace.model("CL-AT-s0"))])
    assert not are_alike(study.context(), ["CL-AT-s0", f"{place}:vit"])
    assert not are_alike(study.context(), ["CL-AT-s0", "test_resnet=w.safetensors"])


def test_the_commands_take_any_network(study, place, tmp_path, monkeypatch):
    """In this process, as `advml represent` and `advml compare` call them."""
    from advml.cli import app

    def advml(*arguments: str) -> None:
        app([*arguments, "--params", str(study.params), "-S", "similarity.layers=blocks"], standalone_mode=False)

    advml("represent", f"{place}:vit", "--images", str(tmp_path / "photos"))
    advml("compare", "cl-at", f"{place}:vit", "--images", str(tmp_path / "photos"), "--mean", "imagenet")
    for folder in (f"compare-{place}-vit", f"compare-cl-at-{place}-vit"):
        assert {"cka.npz", "cka.json", "clean.png"} <= {path.name for path in (study.workspace.reports / folder).iterdir()}
    with pytest.raises(UserError, match="at least two"):
        advml("compare", f"{place}:vit")
    with pytest.raises(UserError, match="a regime can only follow a scheme"):
        advml("represent", f"{place}:vit", "AT")
    for command, option in (
        (("represent", "cl-at"), "--seed"),
        (("represent", "cl-at"), "--mean"),
        (("represent", "CL", "AT"), "--images"),
    ):
        with pytest.raises(UserError, match=f"{option} has no meaning for"):
            advml(*command, option, "1")
    with pytest.raises(UserError, match=r"CL-AT-s0, CL-AT-s0 .*normalisation"):
        advml("compare", "CL-AT-s0", "CL-AT-s0", "--mean", "imagenet")
