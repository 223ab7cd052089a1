"""Match a model's logits to the classes of the data by class name."""

from __future__ import annotations

import os.path
import unicodedata
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from advml.core.errors import UserError
from advml.core.messages import first_of
from advml.data.folder_layout import natural_order

# Named orders that `--classes` accepts: name -> function from the data's classes to the order of the logits.
ORDERS: dict[str, Callable[[Sequence[str]], list[str]]] = {"natural": natural_order}


def read(text: str, classes: Sequence[str]) -> list[str]:
    """Class names in the order of the model's logits, from the value of `--classes`.

    Args:
        text: a file with one name per line, "a,b,c", or a key of ORDERS.
        classes: class names of the data, which an order of ORDERS sorts.
    """
    if text in ORDERS:
        return ORDERS[text](classes)
    try:  # os.path, because Path.is_file raises on a text longer than a path may be
        given = Path(text).read_text(encoding="utf-8-sig").splitlines() if os.path.isfile(text) else text.split(",")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--classes {text} cannot be read ({error}); give a text file in UTF-8 with one class name per line") from None
    return [name.strip() for name in given if name.strip()]


def positions(names: Sequence[str], classes: Sequence[str], *, of: str, logits: int | None = None) -> list[int]:
    """Position of each data class among the model's logits: `logits[:, positions(...)]` are in the data's order.

    Args:
        names: class names in the order of the model's logits; compared in Unicode's composed form (NFC).
        classes: class names of the data, in the data's order.
        of: name of the model, for error messages.
        logits: number of logits of the model, if known.
    Raises:
        UserError: the numbers of names and logits differ, a name occurs twice, or the names are not those of the data.
    """
    known, wanted = ([unicodedata.normalize("NFC", name) for name in given] for given in (names, classes))
    if twice := [name for name in known if known.count(name) > 1]:
        raise UserError(f"{of} name the class {twice[0]!r} twice; each logit needs a name of its own")
    for unknown, others, where in (
        ([name for name in known if name not in wanted], wanted, "the prepared data do not have"),
        ([name for name in wanted if name not in known], known, "they lack, but the prepared data have"),
    ):
        if unknown:
            close = get_close_matches(unknown[0], others, n=1, cutoff=0) or ["none"]
            told = first_of([repr(name) for name in unknown], 1)
            raise UserError(
                f"{of} name {len(known)} classes, among them one that {where}: {told} (nearest: {close[0]!r}); "
                "name them as the data do, in the order of the model's logits: --classes a,b,c or --classes FILE"
            )
    if logits not in (None, len(known)):
        raise UserError(f"{of} name {len(known)} classes, but the model gives {logits} logits; each logit needs a name")
    return [known.index(name) for name in wanted]
