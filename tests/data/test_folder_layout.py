"""Natural order of class names."""

from __future__ import annotations

import random

import pytest
from timm.utils.misc import natural_key

from advml.data.folder_layout import natural_order

NAMES = {
    "numbers": [str(number) for number in range(1, 13)],
    "zero-padded": [f"{number:03}" for number in range(0, 120, 7)],
    "text and numbers": ["img12", "img2", "img10b", "img10a", "img", "2img", "img2x3", "img2x12"],
    "cases": ["Zebra", "apple", "Banana", "banana2", "Banana10"],
    "digits of other scripts and powers": ["١٢", "٢", "m²", "m10", "m3"],
    "one": ["only"],
    "none": [],
}


@pytest.mark.parametrize("kind", NAMES)
def test_natural_order_is_the_order_of_timms_trainer_whatever_comes_first(kind):
    expected = sorted(NAMES[kind], key=natural_key)
    for seed in range(5):
        assert natural_order(random.Random(seed).sample(NAMES[kind], len(NAMES[kind]))) == expected


def test_names_that_count_alike_are_sorted_as_text():
    assert natural_order(["a01", "b", "a1", "A1"]) == natural_order(["A1", "a1", "b", "a01"]) == ["A1", "a01", "a1", "b"]
