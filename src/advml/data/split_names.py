"""Recognise usual folder names of splits: `train`, `Testing`, `val_images`, `seg_train`, ..."""

from __future__ import annotations

import re

# Split -> words for it, without separators. `unlabelled` is not a split: such a folder beside splits is left out.
WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "validation": ("validation", "validate", "validating", "valid", "val", "dev", "devel", "development", "publictest"),
    "test": ("test", "testing", "tests", "tst", "eval", "evaluation", "evaluating", "holdout", "heldout", "privatetest"),
    "unlabelled": ("unlabelled", "unlabeled", "pred", "predict", "prediction", "predictions", "inference", "submission"),
}
# Words (besides digits) that may precede or follow such a word without changing its meaning.
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
    """Split that a folder's name means (None: none), and the remaining words of the name.

        >>> split_of("Training Images"), split_of("seg_test"), split_of("trainset2017"), split_of("contest"), split_of("train-or-test")
        (('train', ''), ('test', 'seg'), ('train', ''), (None, 'contest'), (None, 'train or test'))

    Splits of one dataset have the same remaining words (`seg_train`, `seg_test`), unlike classes such as `toy train`.
    """
    parts = re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])", name)  # CamelCase counts as two words
    words = [part.casefold() for part in parts]
    if whole := _WORD.fullmatch("".join(words)):  # hold-out, PublicTest
        return _SPLIT_OF_WORD[whole[1]], ""
    found = {word: match[1] for word in words if (match := _WORD.fullmatch(word))}
    splits = {_SPLIT_OF_WORD[word] for word in found.values()}
    if len(splits) != 1:
        return None, " ".join(words)
    return splits.pop(), " ".join(word for word in words if word not in found and word not in DECORATION)
