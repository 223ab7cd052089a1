"""Names of split folders."""

from __future__ import annotations

import pytest

from advml.data.split_names import WORDS, split_of

NAMES = {
    "train": "Train TRAINING train_set trainset TrainImages Training-Images train2017 01_train my_train_data train_val dataset_train",
    "validation": "val Valid validation_set VAL_IMAGES dev devset ValidationData val2 PublicTest",
    "test": "Testing test-set TestSet tests eval Evaluation hold-out HeldOut holdout_images 02-test PrivateTest",
    "unlabelled": "pred unlabeled UNLABELLED_images predictions",
}


@pytest.mark.parametrize(("split", "names"), [(split, names.split()) for split, names in NAMES.items()], ids=NAMES)
def test_the_usual_names_are_known_in_any_spelling(split, names):
    assert {name: split_of(name) for name in names} == dict.fromkeys(names, (split, ""))


@pytest.mark.parametrize(
    "name", ["contest", "protest", "untested", "strainer", "devil", "invalid", "valley", "cats", "12", "", "evaluator", "训练"]
)
def test_a_word_within_another_word_counts_for_nothing(name):
    assert split_of(name)[0] is None


def test_the_rest_of_a_name_tells_splits_of_one_data_set_from_classes():
    assert [split_of(name) for name in ("seg_train", "seg_test", "SegPred", "toyTrain", "été-test")] == [
        ("train", "seg"),
        ("test", "seg"),
        ("unlabelled", "seg"),
        ("train", "toy"),
        ("test", "été"),
    ]


def test_a_name_that_speaks_of_two_splits_is_none():
    assert split_of("train or test")[0] is None and split_of("test_dev")[0] is None


def test_no_word_stands_for_two_splits():
    words = [word for words in WORDS.values() for word in words]
    assert len(words) == len(set(words))


def test_a_name_as_long_as_a_file_system_allows_takes_no_time():
    assert split_of("dataset" * 36)[0] is None
