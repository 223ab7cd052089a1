"""Check whether an external model expects another normalisation, or order of channels or classes, than it is evaluated with.

With wrong ones, a model is about as accurate as chance, and its accuracy does not show the reason. So before the evaluation, the model
classifies validation images under every normalisation of a table, as RGB and as BGR, and its predictions are compared with the labels
under every plausible order of the classes. A combination that is far better than the one in use raises a flag that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from advml.attacks.isolation import frozen_copy
from advml.core.device import Machine, derived_seed, generator_for, own_randomness
from advml.core.errors import UserError
from advml.core.messages import first_of
from advml.data.datasets import Dataset
from advml.evaluation.intervals import binomial_tail
from advml.evaluation.masking.rules import SIGNIFICANCE, Flag
from advml.evaluation.run_attacks import predict
from advml.models.class_names import ORDERS
from advml.models.normalization import KNOWN, Constants

IMAGES = 512  # largest number of validation images
FAR = 0.05  # smallest gain in accuracy that raises a flag
GIVEN, FITTED = "as given", "fitted"


@dataclass(frozen=True)
class Expectations:
    """Result of `check_expectations`.

    Attributes:
        flags: any of `other_normalization`, `other_channel_order` and `other_class_order`.
        record: for JSON: validation accuracy under each normalisation and order, and `classes`, the names of the logits in the order
            that a flag proposes.
    """

    flags: tuple[Flag, ...]
    record: dict[str, Any]


def check_expectations(
    network: nn.Module,
    dataset: Dataset,
    machine: Machine,
    *,
    constants: Constants,
    classes: Sequence[str] | None = None,
    batch_size: int = 512,
) -> Expectations:
    """Compare the normalisation and class order in use with others, on validation images.

    Args:
        network: maps images in [0, 1] to logits after normalising them by `constants`; copied if possible.
        constants: mean and std of the normalisation in use, per channel.
        classes: given names in the order of the model's own logits; None: the data's order.
    """
    chosen = torch.randperm(len(dataset.validation), generator=generator_for("expectations"))[:IMAGES]
    images, labels = dataset.validation.images[chosen], dataset.validation.labels[chosen]
    candidates = _candidates(constants, dataset)
    guesses = _guesses(network, images, machine, constants, candidates, batch_size)
    orders = {GIVEN: torch.arange(len(dataset.classes))} | {name: _places(dataset.classes, order) for name, order in ORDERS.items()}
    places, right = {}, {}
    for shown, guessed in guesses.items():
        for order, fixed in orders.items():
            places[*shown, order], right[*shown, order] = fixed, _mapped(guessed, fixed) == labels
        places[*shown, FITTED], right[*shown, FITTED] = _fitted(guessed, labels, count=len(dataset.classes))
    best = max(right, key=lambda how: int(right[how].sum()))  # on a tie the first one, which is in use
    normalization, channels, order = best
    flags, record = [], {"images": len(labels), "accuracy": _accuracies(right)}
    usual = right[GIVEN, "RGB", order]  # others may be missing: the network fails on them
    plain = right.get((GIVEN, channels, order), usual)
    others = {name: right[name, channels, order] for name, shown in guesses if shown == channels}
    if _far_better(right[best], plain, of=len(others)):
        helping = {name: values for name, values in others.items() if _far_better(values, plain, of=len(others))}
        flags.append(_normalization_flag(helping, plain, candidates))
    if channels == "BGR" and _far_better(right[best], rgb := right.get((normalization, "RGB", order), usual), of=2):
        flags.append(_channel_flag(right[best], rgb))
    plain = right[normalization, channels, GIVEN]
    if _far_better(right[best], plain, of=len(orders)) and _holds_for_the_moved(places[best], right[best], labels):
        record["classes"] = [dataset.classes[places[best][dataset.classes.index(name)]] for name in classes or dataset.classes]
        flags.append(_order_flag(order, record["classes"], right[best], plain, dataset.classes))
    return Expectations(tuple(flags), record)


def _candidates(constants: Constants, dataset: Dataset) -> dict[str, Constants]:
    """Candidate normalisations by name, the one in use first, without repetition."""
    known = KNOWN | {"data": Constants(dataset.mean, dataset.std)}
    channels = dataset.shape[0]
    return {GIVEN: constants} | {name: found for name in known if (found := known[name].of_channels(channels)) != constants}


@torch.no_grad()
def _guesses(
    network: nn.Module, images: Tensor, machine: Machine, constants: Constants, candidates: Mapping[str, Constants], batch_size: int
) -> dict[tuple[str, str], Tensor]:
    """Predicted classes (N,) under each candidate, as RGB, then as BGR; none where the network fails."""
    found = {}
    for channels, (name, candidate) in product(("RGB", "BGR") if len(constants.mean) == 3 else ("RGB",), candidates.items()):
        shown = partial(_shown, constants=constants, candidate=candidate, reverse=channels == "BGR")
        with frozen_copy(network) as own, own_randomness(derived_seed("expectations", name), machine.device):
            try:
                found[name, channels] = torch.cat(
                    [predict(own, shown(x), machine).cpu() for x in map(machine.images, images.split(batch_size))]
                )
            except UserError:
                if (name, channels) == (GIVEN, "RGB"):
                    raise
    return found


def _shown(images: Tensor, *, constants: Constants, candidate: Constants, reverse: bool) -> Tensor:
    """Images for a network that normalises by `constants`, so that it computes with those of `candidate`, in `reverse` order of channels.

    With constants m0, s0 and candidate m, s: s0 (x - m) / s + m0, where the channels of (x - m) / s are reversed first.
    """
    if candidate == constants and not reverse:
        return images  # to the last bit
    m0, s0, mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (*constants, *candidate))
    normalised = (images - mean) / std
    return s0 * (normalised.flip(1) if reverse else normalised) + m0


def _places(classes: Sequence[str], order: Callable[[Sequence[str]], Sequence[str]]) -> Tensor:
    """Label of each logit, if logits are in another order of the classes."""
    return torch.tensor([classes.index(name) for name in order(classes)])


def _mapped(guessed: Tensor, places: Tensor) -> Tensor:
    """Predictions under another order of classes; NOT_FINITE stays."""
    return torch.where(guessed < 0, guessed, places[guessed])


def _fitted(guessed: Tensor, labels: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """One-to-one assignment of logits to labels with the highest accuracy, and a mask (N,) of correct images in cross-validation.

    Each half of the images is judged by the assignment fitted on the other half; fitting and judging on the same images would always
    find a good assignment for many classes and few images. A logit keeps its label if images do not decide.
    """

    def assignment(rows: slice) -> Tensor:
        known = guessed[rows] >= 0
        confusion = torch.bincount(count * guessed[rows][known] + labels[rows][known], minlength=count**2).view(count, count).double()
        return torch.from_numpy(linear_sum_assignment(confusion + 0.5 * torch.eye(count), maximize=True)[1])

    halves, right = (slice(0, None, 2), slice(1, None, 2)), torch.zeros(len(labels), dtype=torch.bool)
    for own, other in (halves, halves[::-1]):
        right[own] = _mapped(guessed[own], assignment(other)) == labels[own]
    return assignment(slice(None)), right


def _far_better(one: Tensor, other: Tensor, *, of: int) -> bool:
    """Whether `one` (N,) is correct on FAR more of the same images than `other`, beyond the chance of the best of `of` candidates.

    One-sided sign test on the images that only one of them classifies correctly, with Bonferroni's correction for the candidates.
    """
    more, fewer = int((one & ~other).sum()), int((~one & other).sum())
    return more - fewer >= FAR * len(one) and binomial_tail(more, more + fewer, share=0.5) * of < SIGNIFICANCE


def _holds_for_the_moved(places: Tensor, right: Tensor, labels: Tensor) -> bool:
    """Whether most images of the reassigned classes become correct; excludes the frequent mistakes of an inaccurate model."""
    moved = places[places != torch.arange(len(places))]
    rows = torch.isin(labels, moved)
    return bool(rows.any()) and bool(right[rows].double().mean() > 0.5)


def _accuracies(right: Mapping[tuple[str, str, str], Tensor]) -> dict[str, dict[str, float]]:
    """By normalisation (`imagenet`, `imagenet, BGR`), then by order of the classes."""
    found: dict[str, dict[str, float]] = {}
    for (normalization, channels, order), values in right.items():
        name = normalization if channels == "RGB" else f"{normalization}, {channels}"
        found.setdefault(name, {})[order] = float(values.double().mean())
    return found


def _percent(right: Tensor) -> str:
    return f"{100 * float(right.double().mean()):.1f} %"


def _normalization_flag(helping: Mapping[str, Tensor], given: Tensor, candidates: Mapping[str, Constants]) -> Flag:
    ranked = sorted(helping, key=lambda name: -int(helping[name].sum()))
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in candidates[ranked[0]])
    shares = ", ".join(f"{_percent(helping[name])} with {name}" for name in ranked[:3])
    return Flag(
        "other_normalization",
        f"of {len(given)} validation images {_percent(given)} are right with the normalisation in use, {shares}: it expects another one",
        f"advml evaluate again with --mean {ranked[0]} (mean {mean}; std {std})",
    )


def _channel_flag(better: Tensor, given: Tensor) -> Flag:
    return Flag(
        "other_channel_order",
        f"of {len(given)} validation images {_percent(given)} are right as RGB, {_percent(better)} as BGR, which OpenCV reads",
        "give it the channels in reverse: def wrapped(): model = make(); "
        "model.register_forward_pre_hook(lambda model, inputs: (inputs[0].flip(1),)); return model",
    )


def _order_flag(order: str, names: Sequence[str], better: Tensor, given: Tensor, classes: Sequence[str]) -> Flag:
    listed = ",".join(names)
    short = len(listed) <= 120 and not any("," in name for name in names)
    option = (
        order
        if order in ORDERS
        else listed
        if short
        else "FILE with the names listed under expected.classes in its record (records/evaluate/)"
    )
    return Flag(
        "other_class_order",
        f"of {len(given)} validation images {_percent(given)} are right if logits are in the order of the data's classes "
        f"({first_of(classes, 4)}), {_percent(better)} if in the order {first_of(names, 4)}: labels are permuted",
        f"advml evaluate again with --classes {option}",
    )
