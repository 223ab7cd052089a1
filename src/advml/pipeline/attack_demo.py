"""Picture of one adversarial example, for `advml attack IMAGE --model MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from advml.attacks.pgd import Adversary, evaluation_adversary
from advml.attacks.threat_model import NORMS
from advml.core.device import generator_for
from advml.core.errors import UserError
from advml.core.io import write_atomically
from advml.core.paths import find_model
from advml.data.images import decode
from advml.figures.example import draw, quoted
from advml.figures.style import NORM_NAMES, to_png
from advml.models.network import load_classifier, read_record, under_attack
from advml.pipeline.context import Context
from advml.training.losses import cross_entropy


def attack_picture(context: Context, path: Path, *, model: str, out: Path) -> str:
    """Attack the image at `path` as `evaluate` would, write the picture to `out`, and return the result as a sentence.

    Args:
        context: gives the threat model, the attack's settings and the machine.
        path: any image file.
        model: a model's name (CL-Full-AT-s0) or folder.
        out: a PNG file.
    Raises:
        UserError: model or image do not exist, or `out` is a folder or does not end in .png.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the picture, e.g. --out {out / 'attack.png'}")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: only .png is written, e.g. --out {out.with_suffix('.png')}")
    folder = find_model(context.workspace, model)
    record, network = read_record(folder), load_classifier(folder).to(context.machine.device)
    architecture = network.architecture
    image = load_image(path, channels=architecture.channels, size=architecture.image_size, white=record.get("white_level"))
    adversary = evaluation_adversary(context.config.evaluate, context.config.threat_model)
    classes = record.get("classes") or [str(number) for number in range(architecture.classes)]  # imported models may lack class names
    figure, result = attack_figure(network, image, classes, adversary=adversary, seed=context.config.evaluate.seed)
    write_atomically(out, to_png(figure))
    return f"{result['headline']}: {result['size']}"


def load_image(path: str | Path, *, channels: int, size: int, white: float | None = None) -> Tensor:
    """Read an image file as `prepare` would: float (1, C, size, size) in [0, 1].

    Args:
        white: value of white in images of more than 8 bits, as in the model's training data; None: from the image's own range.
    Raises:
        UserError: the file does not exist or is not an image.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give an image file")
    try:
        pixels = decode(path, size=size, channels=channels, white=white)
    except Exception as error:  # a broken file may raise anything: OSError, SyntaxError, struct.error, ...
        raise UserError(f"{path} cannot be read as an image ({' '.join(str(error).split())}); save it as PNG or JPEG") from None
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float() / 255


def attack_figure(
    network: nn.Module, image: Tensor, classes: list[str], *, adversary: Adversary, seed: int = 0
) -> tuple[Figure, dict[str, Any]]:
    """Attack one image, untargeted (away from the network's prediction), and draw the result.

    Args:
        network: maps images (N, C, H, W) in [0, 1] to logits (N, K).
        image: (1, C, H, W) in [0, 1].
        classes: K names.
        adversary: threat model and attack.
        seed: of the random start.
    Returns:
        The figure, and a dict: `prediction_before`, `prediction_after` (names), `confidence_before`, `confidence_after` (of those
        predictions), `linf`, `l2` (norms of the perturbation), `success` (the prediction has changed), `headline` and `size` (sentences).
    """
    image = image.to(next((parameter.device for parameter in network.parameters()), image.device))
    before = _probabilities(network, image)
    target = before.argmax(0, keepdim=True)
    adversarial = adversary.attack(
        network,
        lambda: lambda candidates: cross_entropy(network(candidates), target),
        image,
        generator=generator_for("picture", seed),
    )
    after = _probabilities(network, adversarial)
    sizes = {name: float(norm.size(adversarial - image)) for name, norm in NORMS.items()}
    result: dict[str, Any] = dict(sizes)
    for when, probabilities in (("before", before), ("after", after)):
        result[f"prediction_{when}"] = classes[int(probabilities.argmax())]
        result[f"confidence_{when}"] = float(probabilities.max())
    result["success"] = int(target) != int(after.argmax())
    result |= {"headline": _headline(result), "size": _size(adversary.threat_model.norm, sizes)}
    return draw(image.cpu(), adversarial.cpu(), classes, before.cpu(), after.cpu(), result), result


@torch.no_grad()
def _probabilities(network: nn.Module, image: Tensor) -> Tensor:
    """Class probabilities (K,) of an image (1, C, H, W) in eval mode; restores the network's mode."""
    with under_attack(network):
        return network(image).float().softmax(1)[0]


def _headline(result: dict[str, Any]) -> str:
    before, after = (quoted(result[key]) for key in ("prediction_before", "prediction_after"))
    if result["success"]:
        return f"The attack changes the prediction from {before} to {after}"
    return f"The prediction {after} is unchanged; whether it is right is not known"  # the image's class is not given


def _size(norm: str, sizes: dict[str, float]) -> str:
    """Size of the perturbation in the threat model's norm and in grey levels, as a phrase."""
    return f"{NORM_NAMES[norm]} size {sizes[norm]:.3g}, at most {255 * sizes['linf']:.3g} of 255 grey levels"
