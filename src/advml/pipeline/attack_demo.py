"""What `advml attack IMAGE --model MODEL` draws: an adversarial example that explains itself."""

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
    """Attack the image at `path` as `evaluate` would, write the picture to `out`, and say in a sentence what happened.

    Args:
        context: gives the threat model, the attack's settings and the machine.
        path: any image file.
        model: a model's name (CL-Full-AT-s0) or folder.
        out: a PNG file.
    Raises:
        UserError: no such model or image, or `out` is no place for a PNG file.
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
    figure, result = attack_figure(network, image, record["classes"], adversary=adversary, seed=context.config.evaluate.seed)
    write_atomically(out, to_png(figure))
    return f"{result['headline']}: {result['size']}"


def load_image(path: str | Path, *, channels: int, size: int, white: float | None = None) -> Tensor:
    """An image file as a dataset would hold it: float (1, C, size, size) in [0, 1].

    Args:
        white: value of white in an image of more than 8 bits, of the model's training data; None: by the image's own range.
    Raises:
        UserError: if there is no such file, or it is no image.
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
    network: nn.Module, image: Tensor, classes: list[str], *, adversary: Adversary, label: int | None = None, seed: int = 0
) -> tuple[Figure, dict[str, Any]]:
    """Attack one image, untargeted (away from `label`, or from what the network takes it for), and draw what happened.

    Args:
        network: maps images (N, C, H, W) in [0, 1] to logits (N, K).
        image: (1, C, H, W) in [0, 1].
        classes: K names.
        adversary: threat model and attack.
        label: the true class, if it is known.
        seed: of the random start.
    Returns:
        The figure, and a dict: `label`, `prediction_before`, `prediction_after` (names), `confidence_before`,
        `confidence_after` (of those predictions), `linf`, `l2` (sizes of the perturbation), `success` (the prediction
        was right, or the network's own, and is now another), `headline` and `size` (sentences).
    """
    image = image.to(next((parameter.device for parameter in network.parameters()), image.device))
    before = _probabilities(network, image)
    target = before.argmax(0, keepdim=True) if label is None else torch.tensor([label], device=image.device)
    adversarial = adversary.attack(
        network,
        lambda: lambda candidates: cross_entropy(network(candidates), target),
        image,
        generator=generator_for("picture", seed),
    )
    after = _probabilities(network, adversarial)
    sizes = {name: float(norm.size(adversarial - image)) for name, norm in NORMS.items()}
    result: dict[str, Any] = {"label": classes[int(target)], **sizes}
    for when, probabilities in (("before", before), ("after", after)):
        result[f"prediction_{when}"] = classes[int(probabilities.argmax())]
        result[f"confidence_{when}"] = float(probabilities.max())
    result["success"] = int(before.argmax()) == int(target) != int(after.argmax())
    result |= {"headline": _headline(result), "size": _size(adversary.threat_model.norm, sizes)}
    return draw(image.cpu(), adversarial.cpu(), classes, before.cpu(), after.cpu(), result), result


@torch.no_grad()
def _probabilities(network: nn.Module, image: Tensor) -> Tensor:
    """(1, C, H, W) -> (K,), in eval mode; the network's mode stays."""
    with under_attack(network):
        return network(image).float().softmax(1)[0]


def _headline(result: dict[str, Any]) -> str:
    label, before, after = (quoted(result[key]) for key in ("label", "prediction_before", "prediction_after"))
    if before != label:
        return f"The model takes this {label} for {before} before any attack, and for {after} after it"
    if result["success"]:
        return f"The attack makes the model take {before} for {after}"
    return f"The model withstands: it takes the image for {after} before and after the attack"


def _size(norm: str, sizes: dict[str, float]) -> str:
    """What the perturbation measures, in the threat model's norm and in words."""
    return f"{NORM_NAMES[norm]} size {sizes[norm]:.3g}, at most {255 * sizes['linf']:.3g} of 255 grey levels"
