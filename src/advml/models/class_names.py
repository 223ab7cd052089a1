"""Order of a model's logits, when the names of their classes are known: by name, never by number."""

from __future__ import annotations

import os.path
import unicodedata
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from advml.core.errors import UserError
from advml.data.folder_layout import natural_order

# Name -> an order of the data's classes that models come in.
ORDERS: dict[str, Callable[[Sequence[str]], list[str]]] = {"natural": natural_order}


def read(text: str, classes: Sequence[str]) -> list[str]:
    """The names that `--classes` gives, in the order of the model's logits: a file with one per line, "a,b,c", or a name of ORDERS.

    Args:
        classes: of the data.
    """
    if text in ORDERS:
        return ORDERS[text](classes)
    try:  # names may be longer than a path can be, for which Path.is_file raises
        given = Path(text).read_text(encoding="utf-8-sig").splitlines() if os.path.isfile(text) else text.split(",")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--classes {text} cannot be read ({error}); give a text file in UTF-8 with one class name per line") from None
    return [name.strip() for name in given if name.strip()]


def positions(names: Sequence[str], classes: Sequence[str], *, of: str, logits: int | None = None) -> list[int]:
    """For each class of the data the position of its logit: `logits[:, positions(...)]` are in the data's order.

    Args:
        names: of the classes, in the order of the model's logits; compared as Unicode, composed (NFC).
        classes: of the data, in their order.
        of: whose names they are, for errors.
        logits: that the model gives, where that is known.
    Raises:
        UserError: there are not as many names as logits, a name occurs twice, or the names are not those of the data.
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
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise UserError(
                f"{of} name {len(known)} classes, among them one that {where}: {unknown[0]!r}{more} (nearest: {close[0]!r}); "
                "name them as the data do, in the order of the model's logits: --classes a,b,c or --classes FILE"
            )
    if logits not in (None, len(known)):
        raise UserError(f"{of} name {len(known)} classes, but the model gives {logits} logits; each logit needs a name")
    return [known.index(name) for name in wanted]
