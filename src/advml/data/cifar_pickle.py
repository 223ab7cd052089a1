"""Read the pickles of CIFAR's python archive without `pickle`, so that nothing is imported or called.

A pickle is a program for a stack machine. Here, the operations that occur in those files (Python 2's cPickle, protocol 2) are
interpreted: they build plain values (dicts, lists, tuples, text, integers) and uint8 arrays. Any other operation, name or array is
refused. (https://docs.python.org/3/library/pickletools.html)
"""

from __future__ import annotations

import pickletools
from typing import Any, NamedTuple

import numpy as np

LITERALS = ("BININT", "BININT1", "BININT2", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NAMES = {  # allowed names, of old and new NumPy
    **dict.fromkeys(("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"), "reconstruct"),
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
}


class Name(NamedTuple):
    """Placeholder of an object that a pickle names."""

    name: str


class Call(NamedTuple):
    """Placeholder of a call in a pickle, which is not executed."""

    function: Any
    arguments: Any


def read_pickle(content: bytes) -> Any:
    """Value of a pickle of plain values and uint8 arrays; bytes are decoded as latin-1.

    Raises:
        ValueError: the pickle contains anything else, or is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    try:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "STOP":
                return stack[-1]
            _step(operation.name, argument, stack, marks, memo)
    except (LookupError, TypeError) as error:
        raise ValueError(f"damaged pickle: {error}") from None
    raise ValueError("damaged pickle: it does not end")


def _step(name: str, argument: Any, stack: list[Any], marks: list[int], memo: dict[int, Any]) -> None:
    def above_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    if name == "PROTO":
        return
    if name == "MARK":
        marks.append(len(stack))
    elif name in LITERALS:
        stack.append(argument)
    elif name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name in EMPTY:
        stack.append(EMPTY[name]())
    elif name in TUPLES:
        stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
    elif name == "TUPLE":
        stack.append(tuple(above_mark()))
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("APPEND", "APPENDS"):
        items = above_mark() if name == "APPENDS" else [stack.pop()]
        list.extend(stack[-1], items)
    elif name in ("SETITEM", "SETITEMS"):
        items = above_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        dict.update(stack[-1], zip(items[::2], items[1::2], strict=True))
    elif name == "GLOBAL" and argument in NAMES:
        stack.append(Name(NAMES[argument]))
    elif name == "REDUCE":
        stack[-2:] = [Call(*stack[-2:])]
    elif name == "BUILD":
        stack[-2:] = [_built(*stack[-2:])]
    else:
        raise ValueError(f"{name}{'' if argument is None else f' {argument}'} is refused: no pickle is ever loaded")


def _built(call: Any, state: Any) -> Any:
    """Result of one of the two calls of NumPy that are interpreted: the dtype uint8, or an array of it."""
    match call, state:
        case Call(Name("dtype"), ("u1", *_)), (3, "|", None, None, None, -1, -1, 0):
            return np.uint8
        case Call(Name("reconstruct"), (Name("ndarray"), (0,), "b")), (1, tuple(shape), np.uint8, bool(by_columns), str(values)):
            return np.frombuffer(values.encode("latin-1"), np.uint8).reshape(shape, order="F" if by_columns else "C")
    raise ValueError("an object other than a uint8 array is refused: no pickle is ever loaded")
