"""Reads the pickles of CIFAR's python archive without `pickle`: nothing is imported and nothing is called.

A pickle is a program for a stack machine. The operations that those files consist of build plain values here (dicts,
lists, tuples, text, whole numbers) and uint8 arrays; any other operation, name or array is refused. The files come from
Python 2's cPickle, protocol 2. (https://docs.python.org/3/library/pickletools.html)
"""

from __future__ import annotations

import pickletools
from typing import Any, NamedTuple

import numpy as np

LITERALS = ("BININT", "BININT1", "BININT2", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NAMES = {  # old and new NumPy
    **dict.fromkeys(("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"), "reconstruct"),
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
}


class Name(NamedTuple):
    """A name of NAMES in place of what it names."""

    name: str


class Call(NamedTuple):
    """A call that is not made."""

    function: Any
    arguments: Any


def read_pickle(content: bytes) -> Any:
    """The value in a pickle of plain values and uint8 arrays; bytes become text, each byte a character (latin-1).

    Raises:
        ValueError: it holds anything else, or is damaged.
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
        raise ValueError(f"no sound pickle: {error}") from None
    raise ValueError("no sound pickle: it does not end")


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
    """What NumPy makes of its two calls: the type uint8, or an array of it."""
    match call, state:
        case Call(Name("dtype"), ("u1", *_)), (3, "|", None, None, None, -1, -1, 0):
            return np.uint8
        case Call(Name("reconstruct"), (Name("ndarray"), (0,), "b")), (1, tuple(shape), np.uint8, bool(by_columns), str(values)):
            return np.frombuffer(values.encode("latin-1"), np.uint8).reshape(shape, order="F" if by_columns else "C")
    raise ValueError("an object that is no array of uint8 is refused: no pickle is ever loaded")
