"""Constants of a normalisation are read from a command line: names, one number, or one per channel; impossible ones are refused."""

from __future__ import annotations

import pytest

from advml.core.errors import UserError
from advml.models.normalization import KNOWN, Constants, constants

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        (None, None, None),
        ("imagenet", None, IMAGENET),
        (None, "imagenet", IMAGENET),
        ("none", "imagenet", ((0.0,) * 3, IMAGENET[1])),
        ("0.485, 0.456, 0.406", "0.229,0.224,0.225", IMAGENET),
        ("[0.485 0.456 0.406]", "(0.25)", (IMAGENET[0], (0.25,) * 3)),
        ("0.5", "0.5", ((0.5,) * 3, (0.5,) * 3)),
        ("own", None, ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))),
    ],
)
def test_names_and_numbers(mean, std, expected):
    known = KNOWN | {"own": Constants((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))}
    assert constants(mean, std, known=known, channels=3) == expected


def test_published_constants_of_colours_are_averaged_for_grey_images():
    grey = constants("imagenet", None, known=KNOWN, channels=1)
    assert grey == (pytest.approx((sum(IMAGENET[0]) / 3,)), pytest.approx((sum(IMAGENET[1]) / 3,)))


@pytest.mark.parametrize(
    ("mean", "std", "parts"),
    [
        ("0.5", None, ("--mean 0.5", "--std")),
        (None, "0.5", ("--std 0.5", "--mean")),
        ("imagnet", None, ("--mean imagnet", "imagenet")),
        ("imagnet", "0.5", ("--mean 'imagnet'", "imagenet")),
        ("0.5, 0.5", "0.5", ("--mean", "2 numbers", "3 channels")),
        ("123.7, 116.3, 103.5", "0.2", ("--mean", "255")),
        ("0.5", "58", ("--std '58'", "255")),
        ("0.5", "0", ("--std '0'",)),
        ("nan", "0.5", ("--mean 'nan'",)),
        ("-0.5", "0.5", ("--mean '-0.5'",)),
        ("", "0.5", ("--mean ''",)),
    ],
)
def test_what_no_images_have_is_refused_with_option_and_value(mean, std, parts):
    with pytest.raises(UserError) as stopped:
        constants(mean, std, known=KNOWN, channels=3)
    assert all(part in str(stopped.value) for part in parts) and "\n" not in str(stopped.value)
