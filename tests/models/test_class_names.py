"""Logits are put into the data's order by the names of their classes; names that do not fit are refused with the nearest."""

from __future__ import annotations

import pytest

from advml.core.errors import UserError
from advml.models.class_names import positions, read

CLASSES = ("1", "10", "2", "café")


def test_names_come_from_a_list_a_file_or_an_order(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\ufeffcafé\n2, or two\r\n\n 1 \n", encoding="utf-8")
    assert read("2,1, 10", CLASSES) == ["2", "1", "10"]
    assert read(str(file), CLASSES) == ["café", "2, or two", "1"]
    assert read("natural", CLASSES) == ["1", "2", "10", "café"]


def test_a_list_may_be_longer_than_a_file_name():
    names = [f"class number {number}" for number in range(100)]
    assert read(",".join(names), names) == names


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "names").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UserError, match=r"--classes .*names cannot be read"):
        read(str(tmp_path / "names"), CLASSES)


def test_each_class_of_the_data_finds_its_logit():
    names = ["café", "2", "1", "10"]
    assert [names[place] for place in positions(names, CLASSES, of="it")] == list(CLASSES)
    assert positions(["1", "10", "2", "cafe\u0301"], CLASSES, of="it") == [0, 1, 2, 3]  # the same word in another Unicode form


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["1", "10", "2", "cafe"], ("'cafe'", "nearest: 'café'")),
        (["1", "10", "2"], ("'café'", "lack")),
        (["1", "10", "2", "café", "tea"], ("'tea'",)),
        (["1", "10", "2", "2", "café"], ("'2' twice",)),
        (["a", "b", "c", "d"], ("'a' and 3 more", "--classes")),
        ([], ("name 0 classes",)),
    ],
)
def test_other_names_are_refused_with_the_nearest(names, parts):
    with pytest.raises(UserError) as stopped:
        positions(names, CLASSES, of="somebodys model")
    assert str(stopped.value).startswith("somebodys model") and all(part in str(stopped.value) for part in parts)
