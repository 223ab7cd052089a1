"""A model that expects other input or another order of classes raises a flag that names them; an honest or a poor one raises none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from advml.core.device import Machine
from advml.core.errors import UserError
from advml.data.datasets import Dataset, Split, channel_statistics
from advml.evaluation.expectations import Expectations, check_expectations
from advml.models.class_names import positions
from advml.models.normalization import KNOWN, NONE, Constants

CPU = Machine(torch.device("cpu"))
CLASSES = tuple(sorted(str(number) for number in range(1, 13)))  # as text: 1, 10, 11, 12, 2, ...
LEVELS = 20.0 * torch.arange(12) + 10


def split(count: int) -> Split:
    """Plain images; the class is the grey level, in the order of numbers."""
    numbers = torch.arange(count) % 12
    images = LEVELS[numbers].view(-1, 1, 1, 1).expand(-1, 3, 4, 4) + torch.arange(16).view(4, 4) % 3
    labels = torch.tensor([CLASSES.index(str(int(number) + 1)) for number in numbers])
    return Split(images.to(torch.uint8), labels)


@pytest.fixture(scope="module")
def data() -> Dataset:
    parts = {"train": split(48), "validation": split(96), "test": split(12)}
    mean, std = channel_statistics(parts["train"].images)
    return Dataset(**parts, classes=CLASSES, source="levels", digest="0", mean=mean, std=std)


class Levels(nn.Module):
    """The nearest grey level, of images normalised by `expects`; logits in the given order of names."""

    def __init__(self, *, expects: Constants = NONE, names: tuple[str, ...] = CLASSES) -> None:
        super().__init__()
        mean, std = (sum(values) / len(values) for values in expects)
        levels = torch.stack([LEVELS[int(name) - 1] + 1 for name in names]) / 255
        self.register_buffer("levels", (levels - mean) / std)
        self.asked: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append(len(images))
        return -((images.mean((1, 2, 3))[:, None] - self.levels) ** 2)


def found(network: nn.Module, data: Dataset, *, constants: Constants = NONE, **how: object) -> Expectations:
    return check_expectations(network, data, CPU, constants=constants.of_channels(3), **how)


def named(expected: Expectations) -> dict[str, str]:
    """Flag -> what to try."""
    return {flag.name: flag.try_ for flag in expected.flags}


def test_an_honest_model_raises_no_flag(data):
    expected = found(Levels(), data)
    assert expected.flags == () and expected.record["accuracy"]["as given"]["as given"] == 1
    assert expected.record["images"] == 96 and "classes" not in expected.record


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "half", "levels", "data"])
def test_a_model_that_expects_normalised_images_is_told_by_constants_that_help(data, name):
    wanted = KNOWN.get(name) or Constants(data.mean, data.std)
    expected = found(Levels(expects=wanted), data)
    assert named(expected).keys() == {"other_normalization"}
    helping = named(expected)["other_normalization"].partition("--mean ")[2].split()[0]
    assert expected.record["accuracy"][helping]["as given"] == expected.record["accuracy"][name]["as given"] == 1
    assert expected.record["accuracy"]["as given"]["as given"] < 0.5


def test_constants_that_are_in_use_are_replaced_and_not_doubled(data):
    """A model of plain images behind the normalisation of another."""
    wrong = KNOWN["imagenet"].of_channels(3)
    network = nn.Sequential(Normalised(wrong), Levels())
    assert "--mean none" in named(found(network, data, constants=wrong))["other_normalization"]
    right = nn.Sequential(Normalised(wrong), Levels(expects=KNOWN["imagenet"]))
    assert found(right, data, constants=wrong).flags == ()


class Normalised(nn.Module):
    def __init__(self, constants: Constants) -> None:
        super().__init__()
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in constants)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


NATURAL = tuple(str(number) for number in range(1, 13))
SHUFFLED = ("5", "12", "1", "3", "2", "11", "4", "10", "6", "9", "7", "8")


@pytest.mark.parametrize(
    ("names", "option"), [(NATURAL, "--classes natural"), (SHUFFLED, f"--classes {','.join(SHUFFLED)}")], ids=["natural", "shuffled"]
)
def test_logits_in_another_order_are_told_with_the_order_that_mends_them(data, names, option):
    expected = found(Levels(names=names), data)
    assert list(named(expected)) == ["other_class_order"] and named(expected)["other_class_order"].endswith(option)
    assert tuple(expected.record["classes"]) == names
    mended = nn.Sequential(Levels(names=names), Ordered(positions(expected.record["classes"], CLASSES, of="it")))
    assert found(mended, data, classes=names).flags == ()


def test_names_that_were_given_in_a_wrong_order_are_told_in_the_models_own(data):
    wrong = (*NATURAL[1:], NATURAL[0])
    network = nn.Sequential(Levels(names=SHUFFLED), Ordered(positions(wrong, CLASSES, of="it")))
    assert tuple(found(network, data, classes=wrong).record["classes"]) == SHUFFLED


class Ordered(nn.Module):
    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, self.order]


def test_another_normalisation_and_another_order_at_once_are_both_told(data):
    assert named(found(Levels(expects=KNOWN["half"], names=NATURAL), data)).keys() == {"other_normalization", "other_class_order"}


@pytest.mark.parametrize("name", ["none", "imagenet"])
def test_a_model_that_expects_blue_first_is_told_beside_its_normalisation(data, name):
    """The class is the level of red; green and blue say nothing."""
    coloured = data.validation.images.clone()
    coloured[:, 1:] = torch.randint(256, coloured[:, 1:].shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = replace(data, validation=Split(coloured, data.validation.labels))
    constants = KNOWN[name].of_channels(3)

    class Red(Levels):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images[:, -1:])

    network = Red(expects=Constants(*(values[:1] for values in constants)))
    expected = found(network, data)
    assert named(expected).keys() == {"other_channel_order"} | ({"other_normalization"} if name != "none" else set())
    assert expected.record["accuracy"][f"{'as given' if name == 'none' else name}, BGR"]["as given"] == 1
    network.register_forward_pre_hook(lambda model, inputs: (inputs[0].flip(1),))  # as the flag says
    assert found(nn.Sequential(Normalised(constants), network), data, constants=constants).flags == ()


def test_few_images_suffice_where_all_of_them_agree(data):
    few = replace(data, validation=split(12))
    assert "--classes natural" in named(found(Levels(names=NATURAL), few))["other_class_order"]


def test_a_gain_that_is_certain_but_small_raises_no_flag(data):
    """Of 480 images a normalisation mends 20."""

    mean, std = (values[0] for values in KNOWN["half"])

    class Nearly(Levels):
        def forward(self, images: Tensor) -> Tensor:
            plain = bool(images.amin() >= 0)
            logits = super().forward(images if plain else images * std + mean)
            return torch.where((plain & (torch.arange(len(images)) < 20))[:, None], 0, logits)

    expected = found(Nearly(), replace(data, validation=split(480)))
    shares = expected.record["accuracy"]
    assert shares["half"]["as given"] == 1 and 0.95 < shares["as given"]["as given"] < 0.97 and expected.flags == ()


@pytest.mark.parametrize("seed", range(8))
def test_a_model_that_knows_nothing_raises_no_flag(data, seed):
    class Chance(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.rand(len(images), 12)

    few = replace(
        data, validation=Split(data.validation.images[:36], torch.randint(12, (36,), generator=torch.Generator().manual_seed(seed)))
    )
    assert found(Chance(), few).flags == ()


def test_a_poor_model_that_mistakes_each_class_for_another_most_of_the_time_raises_no_flag(data):
    """Another order is far better, but right for less than half of the images."""

    class Poor(Levels):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            chance = torch.rand(len(images), 1)
            return torch.where(chance < 0.4, logits.roll(1, 1), torch.where(chance < 0.5, logits, torch.rand(len(images), 12)))

    expected = found(Poor(), replace(data, validation=split(480)))
    accuracy = expected.record["accuracy"]["as given"]
    assert accuracy["fitted"] > accuracy["as given"] + 0.15 and expected.flags == ()


def test_a_model_that_fails_on_other_input_is_compared_with_the_rest(data):
    class Strict(Levels):
        def forward(self, images: Tensor) -> Tensor:
            if images.min() < 0:
                raise UserError("images must not be negative")
            return super().forward(images)

    expected = found(Strict(expects=KNOWN["levels"]), data)
    assert "--mean levels" in named(expected)["other_normalization"] and "half" not in expected.record["accuracy"]


def test_no_test_image_is_asked_about_and_the_model_stays_as_it_was(data):
    network = Levels()
    network.train()
    hidden = replace(data, test=Split(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)))
    found(network, hidden, batch_size=10)
    assert network.asked == [] and network.training  # a copy was asked


def test_logits_that_are_no_numbers_are_wrong_under_every_order(data):
    class Nothing(Levels):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * torch.nan

    expected = found(Nothing(), data)
    assert expected.flags == () and not any(share for row in expected.record["accuracy"].values() for share in row.values())
