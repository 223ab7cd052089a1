"""Names under which people keep the splits of a data set: `train`, `Testing`, `val_images`, `seg_train`, ..."""

from __future__ import annotations

import re

# split -> words for it, written without separators. `unlabelled` is no split: such a folder beside splits is left out.
WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "validation": ("validation", "validate", "validating", "valid", "val", "dev", "devel", "development", "publictest"),
    "test": ("test", "testing", "tests", "tst", "eval", "evaluation", "evaluating", "holdout", "heldout", "privatetest"),
    "unlabelled": ("unlabelled", "unlabeled", "pred", "predict", "prediction", "predictions", "inference", "submission"),
}
# What may stand before or after such a word, digits included, and adds nothing.
DECORATION = (
    *("set", "sets", "data", "dataset", "split", "splits", "folder", "dir", "directory", "part", "fold"),
    *("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos"),
    *("sample", "samples", "example", "examples"),
    *("the", "my", "new", "full", "all", "final", "original", "orig", "raw", "labelled", "labeled"),
)
_SPLIT_OF_WORD = {word: split for split, words in WORDS.items() for word in words}
_DECORATIONS = "|".join(sorted(DECORATION, key=len, reverse=True))
_WORD = re.compile(rf"(?:{_DECORATIONS})*+({'|'.join(sorted(_SPLIT_OF_WORD, key=len, reverse=True))})(?:{_DECORATIONS})*+")


def split_of(name: str) -> tuple[str | None, str]:
    """The split that a folder's name speaks of, and the words of the name that do not.

        >>> split_of("Training Images"), split_of("seg_test"), split_of("trainset2017"), split_of("contest"), split_of("train-or-test")
        (('train', ''), ('test', 'seg'), ('train', ''), (None, 'contest'), (None, 'train or test'))

    The rest tells names of one data set's splits (`seg_train`, `seg_test`) from classes in which a word for a split occurs (`toy train`).
    """
    parts = re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])", name)  # CamelCase is two words
    words = [part.casefold() for part in parts]
    if whole := _WORD.fullmatch("".join(words)):  # hold-out, PublicTest
        return _SPLIT_OF_WORD[whole[1]], ""
    found = {word: match[1] for word in words if (match := _WORD.fullmatch(word))}
    splits = {_SPLIT_OF_WORD[word] for word in found.values()}
    if len(splits) != 1:
        return None, " ".join(words)
    return splits.pop(), " ".join(word for word in words if word not in found and word not in DECORATION)
