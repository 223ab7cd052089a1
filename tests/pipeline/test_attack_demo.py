"""The picture of one attack: right numbers, a picture a person understands, and one line for what is no image or model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from advml import config
from advml.attacks.pgd import Adversary
from advml.attacks.threat_model import ThreatModel
from advml.config.presets import preset
from advml.core.errors import UserError
from advml.core.paths import Workspace
from advml.figures.style import to_png
from advml.models.network import Architecture, build, save
from advml.pipeline.attack_demo import attack_figure, attack_picture, load_image
from advml.pipeline.context import Context

CLASSES = ["cat", "dog", "bird"]


def adversary(epsilon: float = 0.1, *, norm: str = "linf", random_start: bool = True, steps: int = 10) -> Adversary:
    return Adversary(ThreatModel(norm, epsilon), steps=steps, step_size=epsilon / 4, random_start=random_start, keep="last")


class Linear(nn.Module):
    """Logits W (x - 0.5): the strongest attack is known in closed form."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weights.T


def cat_or_dog(channels: int = 1, size: int = 4) -> Linear:
    """A network that sees a cat where the first half of the pixels is bright; birds never."""
    weights = torch.zeros(3, channels * size * size)
    half = weights.shape[1] // 2
    weights[0, :half], weights[1, :half] = 1, -1
    weights[0, half:], weights[1, half:] = -1, 1
    weights[2] = 0
    return Linear(weights)


def cat(brightness: float = 0.55, channels: int = 1, size: int = 4) -> Tensor:
    image = torch.full((channels * size * size,), 1 - brightness)
    image[: len(image) // 2] = brightness
    return image.view(1, channels, size, size)


def texts(figure: Figure) -> str:
    """All that a reader reads."""
    parts = [figure.get_suptitle()]
    for axes in figure.axes:
        parts += [axes.get_title(), axes.get_xlabel(), *(text.get_text() for text in axes.texts)]
        parts += [label.get_text() for label in axes.get_yticklabels()]
    return "\n".join(parts)


def test_numbers_are_those_of_the_closed_form() -> None:
    figure, result = attack_figure(cat_or_dog(), cat(), CLASSES, adversary=adversary(0.1))
    logit = 16 * 0.05  # every pixel is .05 from the middle; the attack moves it to .05 on the other side
    before = torch.tensor([logit, -logit, 0]).softmax(0)
    assert (result["prediction_before"], result["prediction_after"]) == ("cat", "dog")
    assert result["confidence_before"] == pytest.approx(float(before[0]), abs=1e-5)
    assert result["confidence_after"] == pytest.approx(float(before[0]), abs=1e-5)
    assert result["linf"] == pytest.approx(0.1)
    assert result["l2"] == pytest.approx(0.1 * 4)
    assert result["success"] is True
    original, perturbation, adversarial, _ = figure.axes
    shown = [axes.images[0].get_array()[..., 0] for axes in (original, perturbation, adversarial)]
    assert np.allclose(shown[0], cat()[0, 0])
    assert np.allclose(shown[2], 1 - cat()[0, 0])
    assert np.allclose(shown[1], 1 - (cat()[0, 0] > 0.5).float(), atol=1e-6)  # enlarged to the full range, grey in the middle


def test_the_picture_says_what_happened_in_words() -> None:
    read = texts(attack_figure(cat_or_dog(), cat(), CLASSES, adversary=adversary(8 / 255))[0])
    assert "prediction 'cat' is unchanged" in read and "is not known" in read and "withstands" not in read
    read = texts(attack_figure(cat_or_dog(), cat(), CLASSES, adversary=adversary(26 / 255))[0])
    for words in (
        "The attack changes the prediction from 'cat' to 'dog'",
        "prediction 'cat'\nconfidence 61 %",
        "prediction 'dog'\nconfidence 62 %",
        "perturbation, 4.9 x",
        "L-infinity size 0.102\nat most 26 of 255 grey levels\ngrey: no change",
    ):
        assert words in read


def test_the_size_is_told_in_the_norm_of_the_attack() -> None:
    _, result = attack_figure(cat_or_dog(), cat(), CLASSES, adversary=adversary(0.8, norm="l2", random_start=False))
    assert result["size"] == "L2 size 0.8, at most 51 of 255 grey levels"  # spread evenly: 0.8 / 4 per pixel
    assert result["success"]


def test_bars_show_the_confidences_before_and_after() -> None:
    figure, result = attack_figure(cat_or_dog(), cat(), CLASSES, adversary=adversary())
    bars = figure.axes[3]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["cat", "bird", "dog"]
    widths = {(round(patch.get_y() + patch.get_height() / 2, 1)): patch.get_width() for patch in bars.patches}
    assert widths[-0.2] == pytest.approx(result["confidence_before"])  # cat, before
    assert widths[2.2] == pytest.approx(result["confidence_after"])  # dog, after
    assert widths[0.2] == pytest.approx(widths[1.8])
    assert [text.get_text() for text in bars.get_legend().get_texts()] == ["before", "after"]


def test_classes_that_were_never_likely_get_no_bar() -> None:
    certain = Linear(10 * cat_or_dog().weights.detach())
    figure, _ = attack_figure(certain, cat(), CLASSES, adversary=adversary())
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["cat", "dog"]
    assert "> 99 %" in texts(figure)
    undecided = Linear(torch.zeros(1000, 16))
    figure, _ = attack_figure(undecided, cat(), [str(number) for number in range(1000)], adversary=adversary())
    assert len(figure.axes[3].get_yticklabels()) == 3
    assert "< 1 %" in texts(figure)


def test_an_attack_that_cannot_move_shows_no_perturbation() -> None:
    blind = Linear(torch.zeros(3, 16))
    figure, result = attack_figure(blind, cat(), CLASSES, adversary=adversary(random_start=False))
    assert (result["linf"], result["success"]) == (0, False)
    assert np.all(figure.axes[1].images[0].get_array() == 0.5)
    assert "perturbation, 1 x" in texts(figure)


@pytest.mark.parametrize(("size", "interpolation"), [(8, "nearest"), (32, "nearest"), (224, "auto")])
def test_small_images_are_drawn_pixel_by_pixel(size: int, interpolation: str) -> None:
    figure, _ = attack_figure(cat_or_dog(3, size), cat(0.55, 3, size), CLASSES, adversary=adversary())
    assert [axes.images[0].get_interpolation() for axes in figure.axes[:3]] == [interpolation] * 3


def test_names_may_be_long_and_hold_dollars() -> None:
    names = ["a $5_^ note that goes on for ever", "$\\broken", "_"]
    figure, result = attack_figure(cat_or_dog(), cat(), names, adversary=adversary())
    assert result["prediction_before"] == names[0]
    assert "'a $5_^ note t...'" in texts(figure)
    assert to_png(figure)[:4] == b"\x89PNG"


def test_the_same_seed_draws_the_same_bytes_and_the_network_stays_as_it_was() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    rng = torch.get_rng_state()
    first, second, other = (attack_figure(network, cat(), CLASSES, adversary=adversary(steps=1), seed=seed) for seed in (0, 0, 1))
    assert to_png(first[0]) == to_png(second[0])
    assert first[1] == second[1] != other[1]
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_axes_of_an_image_are_not_mixed_up(tmp_path: Path) -> None:
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    loaded = load_image(tmp_path / "image.png", channels=3, size=4)
    assert torch.equal(loaded[0, 2, 1], torch.tensor(pixels[1, :, 2]) / 255)


def test_what_is_no_image_gets_one_line_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for path, reason in (
        (tmp_path / "absent.png", "does not exist; give an image file"),
        (tmp_path, "is a folder; give an image file"),
        (tmp_path / "note.png", "cannot be read as an image (cannot identify image file"),
        (tmp_path / "empty.png", "cannot be read as an image (empty file); save it as PNG or JPEG"),
    ):
        with pytest.raises(UserError) as caught:
            load_image(path, channels=1, size=8)
        assert str(caught.value).startswith(f"{path} {reason}")
        assert "\n" not in str(caught.value)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    (tmp_path / "params.yaml").write_text(preset("digits"), encoding="utf-8")
    overrides = ["evaluate.steps=2", "threat_model.epsilon=0.25", "runtime.device=cpu", "runtime.threads=0"]
    context = Context(config.load(tmp_path / "params.yaml", overrides), Workspace(tmp_path))
    architecture = Architecture("test_resnet", "small", {}, 1, 8, (0.3,), (0.4,), 3, 100, False, False)
    save(build(architecture, seed=0), context.workspace.model("CL-ST-s0"), {"classes": CLASSES})
    Image.fromarray(np.arange(0, 240, 2, dtype=np.uint8).reshape(12, 10)).save(tmp_path / "photo.png")
    return context


def test_a_trained_model_is_found_by_name_or_folder_and_its_picture_written(context: Context, tmp_path: Path) -> None:
    out = tmp_path / "pictures" / "attack.png"
    said = attack_picture(context, tmp_path / "photo.png", model="CL-ST-s0", out=out)
    assert said.endswith("L-infinity size 0.25, at most 63.8 of 255 grey levels")
    assert out.read_bytes()[:4] == b"\x89PNG"
    again = attack_picture(context, tmp_path / "photo.png", model=str(context.workspace.model("CL-ST-s0")), out=tmp_path / "again.png")
    assert again == said
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()


def test_a_photo_of_12_bits_is_as_bright_as_the_data_that_the_model_has_learnt_from(context: Context, tmp_path: Path) -> None:
    folder, levels = context.workspace.model("CL-ST-s0"), np.arange(120, dtype=np.uint8).reshape(12, 10)
    (folder / "model.json").write_text(json.dumps(json.loads((folder / "model.json").read_text()) | {"white_level": 4095.0}))
    Image.fromarray(levels).save(tmp_path / "eight.png")
    Image.fromarray(np.rint(levels * (4095 / 255)).astype(np.uint16)).save(tmp_path / "twelve.png")  # at most 1911: 11 bits
    for name in ("eight", "twelve"):
        attack_picture(context, tmp_path / f"{name}.png", model="CL-ST-s0", out=tmp_path / f"{name}-attack.png")
    assert (tmp_path / "eight-attack.png").read_bytes() == (tmp_path / "twelve-attack.png").read_bytes()


def test_the_picture_is_of_the_radius_that_evaluate_attacks_with(context: Context, tmp_path: Path) -> None:
    nearer = Context(config.changed(context.config, {"evaluate.epsilon": 0.125}), context.workspace)
    said = attack_picture(nearer, tmp_path / "photo.png", model="CL-ST-s0", out=tmp_path / "attack.png")
    assert said.endswith("L-infinity size 0.125, at most 31.9 of 255 grey levels")


def test_what_is_no_classifier_is_refused(context: Context, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'CL-AT-s9'.* CL-ST-s0"):
        attack_picture(context, tmp_path / "photo.png", model="CL-AT-s9", out=tmp_path / "attack.png")
    encoder = Architecture("test_resnet", "small", {}, 1, 8, (0.3,), (0.4,), None, 100, False, False)
    folder = context.workspace.pretrained("CL-st-s0")
    save(build(encoder, seed=0), folder, {"classes": CLASSES})
    with pytest.raises(UserError, match=r"pretrained encoder.*models/"):
        attack_picture(context, tmp_path / "photo.png", model=str(folder), out=tmp_path / "attack.png")
    assert not (tmp_path / "attack.png").exists()


@pytest.mark.parametrize(
    ("out", "line"),
    [
        ("", "is a folder; name the picture, e.g. --out"),
        ("picture.jpg", r"picture\.jpg: only \.png is written, e\.g\. --out .*picture\.png$"),
        ("picture", r"picture: only \.png is written"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_attack(context: Context, tmp_path: Path, out: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        attack_picture(context, tmp_path / "absent.png", model="absent", out=tmp_path / out)
