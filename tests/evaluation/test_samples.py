"""samples.parquet tells of every image who broke it first, and its bytes depend on its content alone."""

from __future__ import annotations

import hashlib

import pyarrow.parquet as pq
import pytest
import torch

from advml.core.errors import UserError
from advml.data.datasets import Split
from advml.evaluation.run_attacks import NOT_FINITE, Outcome
from advml.evaluation.samples import digest_of, read, table, write

NAN = float("nan")


def outcome(rows: list[int], right: list[bool], predicted: list[int], distance: list[float], passes: float) -> Outcome:
    spent = torch.full((len(rows),), passes)
    return Outcome(
        torch.tensor(rows), torch.tensor(right), torch.tensor(predicted), torch.tensor(distance, dtype=torch.float32), spent, spent / 2
    )


SPLIT = Split(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), torch.tensor([0, 1, 2, 3, 4]))
FOUND = {
    "accuracy/clean": outcome([0, 1, 2, 3, 4], [True, True, True, True, False], [0, 1, 2, 3, 9], [NAN] * 5, 0),
    "accuracy/threat_model_2": outcome([0, 1, 2, 3, 4], [False, True, True, True, False], [7, 1, 2, 3, 9], [0.5, NAN, NAN, NAN, NAN], 20),
    "accuracy/threat_model_2_half": outcome(
        [0, 1, 2, 3, 4], [False, True, True, False, False], [8, 1, 2, 6, 9], [0.25, NAN, NAN, 0.1, NAN], 20
    ),
    "worst_case/square": outcome([1, 2], [False, True], [5, 2], [0.4, NAN], 100),
}


def test_a_row_tells_who_broke_the_image_first_as_what_and_how_far_away():
    rows = table(FOUND, SPLIT, about={}).to_pylist()
    told = [(row["label"], row["predicted"], row["broken_by"], row["broken_as"], row["distance"]) for row in rows]
    assert told == [
        (0, 0, "threat_model_2", 7, 0.5),
        (1, 1, "square", 5, pytest.approx(0.4)),
        (2, 2, None, None, None),
        (3, 3, "threat_model_2_half", 6, pytest.approx(0.1)),
        (4, 9, "clean", None, None),
    ]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["forward"] for row in rows] == [40, 140, 140, 40, 40] and rows[1]["backward"] == 70
    assert [row["right/threat_model_2_half"] for row in rows] == [False, True, True, False, False]
    assert not any(name.startswith("right/") and "square" in name for name in rows[0])


def test_an_image_broken_by_logits_that_are_no_numbers_keeps_that_class_and_its_distance():
    split = Split(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.tensor([0, 1]))
    found = {
        "accuracy/clean": outcome([0, 1], [True, True], [0, 1], [NAN, NAN], 0),
        "accuracy/threat_model_2": outcome([0, 1], [False, True], [NOT_FINITE, 1], [0.5, NAN], 1),
    }
    told = [(row["broken_by"], row["broken_as"], row["distance"]) for row in table(found, split, about={}).to_pylist()]
    assert told == [("threat_model_2", NOT_FINITE, 0.5), (None, None, None)]


def test_the_same_content_gives_the_same_bytes_and_reads_back(tmp_path):
    about = {"model": "CL-AT-s0", "test_digest": digest_of(SPLIT)}
    for name in ("first", "second"):
        write(table(FOUND, SPLIT, about=about), tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    found, told = read(tmp_path / "first")
    assert found.equals(table(FOUND, SPLIT, about=about)) and told == about
    assert pq.read_table(tmp_path / "first").num_rows == 5  # anyone can read it


def test_the_digest_is_of_the_test_images_and_their_labels():
    content = bytes(range(5)) + SPLIT.labels.numpy().tobytes()
    assert digest_of(SPLIT) == hashlib.sha256(content).hexdigest()
    assert digest_of(Split(SPLIT.images, SPLIT.labels.flip(0))) != digest_of(SPLIT) != digest_of(Split(SPLIT.images.flip(0), SPLIT.labels))


@pytest.mark.parametrize("content", [None, b"", b"something else"])
def test_a_missing_or_damaged_table_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "samples.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"samples.parquet is damaged .*dvc repro"):
        read(tmp_path / "samples.parquet")
