"""Reading of pickles of ground truth: an interpreter of a few harmless operations, which runs nothing of the file.

A pickle is a program for a stack machine: it may call any function, and a few bytes may ask for all memory. This
interpreter builds containers, text, numbers and NumPy arrays, and refuses all else. Size, depth and work are limited.
"""

import pickletools
import re
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multigrain.errors import DataError

MOST_BYTES = 2**22
"""Largest size of a file; the published ones are much smaller."""
MOST_ITEMS = 2**21
"""Largest number of operations and of what they copy; and of items, letters and bytes in the content, where what is
shared counts each time."""
DEEPEST = 32
"""Largest number of containers inside each other."""
_FORM = r"(SHORT_)?(BIN)?(INT|STRING|UNICODE|BYTES|FLOAT)[128]?|LONG[14]?|BYTEARRAY8"
_SCALARS = {operation.name for operation in pickletools.opcodes if re.fullmatch(_FORM, operation.name)}
"""Operations that push their argument."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TAKEN = {"EMPTY_LIST": 0, "EMPTY_DICT": 0, "EMPTY_TUPLE": 0, "APPEND": 1, "SETITEM": 2}
_TAKEN |= {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "STACK_GLOBAL": 2, "REDUCE": 2, "BUILD": 1}
"""Number of values that an operation takes off the stack; other operations take all down to the last mark."""
_DTYPE = "[<>=|]?(b1|[iu][1248]|f[248]|U[0-9]{1,4})"
"""NumPy's codes of numbers and text."""


class _RefusedError(Exception):
    """The pickle holds something else; the message is a clause."""


class _Function(str):
    """Dotted name of a function or class, which is never looked up."""


class _Type:
    """A dtype; its state may follow its making."""

    def __init__(self, code: str) -> None:
        if not re.fullmatch(_DTYPE, code):
            raise _RefusedError(f"it holds an array of {code!r:.40}")
        self.dtype = np.dtype(code)


class _Array:
    """An array whose state follows its making."""

    value: Any = ()
    """Number or nested lists."""


class _Content(NamedTuple):
    """A plain value and its size."""

    value: Any
    items: int = 1
    depth: int = 0


class _Interpreter:
    """The stack machine for one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        """Heights of the stack at its marks."""
        self.memo: dict[int, Any] = {}
        self.copied = 0
        """Number of operations, and of the items that they copied."""

    def run(self, content: bytes) -> Any:
        """Return the value of a pickle."""
        for operation, argument, _ in pickletools.genops(content):
            self.spend(1)
            self.step(operation.name, argument)
        (value,) = self.stack
        return value

    def step(self, name: str, argument: Any) -> None:
        """Run one operation."""
        match name:
            case "PROTO" | "FRAME" | "STOP":
                return
            case "MARK":
                self.marks.append(len(self.stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(_known(argument.replace(" ", ".")))
            case _ if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            case _ if name in _SCALARS:
                if isinstance(argument, int) and argument.bit_length() > 128:
                    raise _RefusedError("it holds a number of more than 128 bits")
                self.stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
            case _:
                self.build(name, self.taken(_TAKEN.get(name)))

    def taken(self, count: int | None) -> list[Any]:
        """Take values off the stack, all down to the last mark by default."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise _RefusedError("it takes more than there is")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def build(self, name: str, values: list[Any]) -> None:
        """Run an operation on values that were taken off the stack."""
        match name, values:
            case "LIST" | "EMPTY_LIST", _:
                self.stack.append(values)
            case "TUPLE" | "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3", _:
                self.stack.append(tuple(values))
            case "DICT" | "EMPTY_DICT", _:
                self.stack.append(_dict(values))
            case "APPEND" | "APPENDS", _ if type(self.stack[-1]) is list:
                self.stack[-1].extend(values)
            case "SETITEM" | "SETITEMS", _ if type(self.stack[-1]) is dict:
                self.stack[-1].update(_dict(values))
            case "STACK_GLOBAL", [str(module), str(function)]:
                self.stack.append(_known(f"{module}.{function}"))
            case "REDUCE", [_Function() as function, tuple(arguments)]:
                self.stack.append(self.called(function, arguments))
            case "BUILD", [(_, str(order), *_)] if isinstance(self.stack[-1], _Type):
                self.stack[-1].dtype = self.stack[-1].dtype.newbyteorder(order)  # type: ignore[arg-type]
            case "BUILD", [(_, shape, _Type() as kind, fortran, content)] if isinstance(self.stack[-1], _Array):
                self.stack[-1].value = self.array(content, kind, shape, bool(fortran))
            case _:
                raise _RefusedError(f"it uses the operation {name}, or uses it otherwise than for plain values")

    def called(self, function: str, arguments: Sequence[Any]) -> Any:
        """Return what a function of the pickle would."""
        match _KNOWN[function], arguments:
            case "dtype", (str(code), *_):
                return _Type(code)
            case "_reconstruct", _:
                return _Array()
            case "_frombuffer", (content, _Type() as kind, shape, order):
                return self.array(content, kind, shape, order == "F")
            case "scalar", (_Type() as kind, content):
                return self.array(content, kind, (), False)
            case "encode", (str(text), "latin1"):  # bytes that Python 3 wrote in a protocol of Python 2
                self.spend(len(text))
                return text.encode("latin1")
            case "bytes", ():  # the same, for b""
                return b""
        raise _RefusedError(f"it calls {function} otherwise than for plain values")

    def array(self, content: bytes | str, kind: _Type, shape: Sequence[int], fortran: bool) -> Any:
        """Return an array (*shape) from its bytes, which Python 2 wrote as text, as nested lists."""
        if type(shape) is not tuple or len(shape) > DEEPEST or min(shape, default=0) < 0:
            raise _RefusedError(f"it holds an array of shape {shape!r:.40}")
        self.spend(len(content) + sum(accumulate(shape, mul)))  # (10**9, 0) has no bytes, but as many lists
        raw = content.encode("latin1") if isinstance(content, str) else content
        values = np.frombuffer(raw, kind.dtype)
        return (values.reshape(shape[::-1]).T if fortran else values.reshape(shape)).tolist()

    def spend(self, items: int) -> None:
        """Count what is copied. Raises _RefusedError beyond `MOST_ITEMS`."""
        self.copied += items
        _stop_if_large(self.copied)


_KNOWN = {
    "_codecs.encode": "encode",
    "__builtin__.bytes": "bytes",
    "numpy.dtype": "dtype",
    "numpy.ndarray": "ndarray",
    **{f"numpy.{core}.multiarray.{name}": name for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
    **{f"numpy.{core}.numeric._frombuffer": "_frombuffer" for core in ("core", "_core")},
}
"""Functions and classes that pickles of plain values name."""


def _known(name: str) -> _Function:
    if name not in _KNOWN:
        raise _RefusedError(f"it wants {name:.80}")
    return _Function(name)


def _dict(values: Sequence[Any]) -> dict[Any, Any]:
    """Return a dict from its keys and values in turn."""
    if not all(isinstance(key, str | int | float | bytes) for key in values[::2]):  # hashing a tuple may take for ever
        raise _RefusedError("it holds a key that is neither text nor a number")
    return dict(zip(values[::2], values[1::2], strict=True))


def _stop_if_large(items: int) -> None:
    if items > MOST_ITEMS:
        raise _RefusedError(f"it holds more than {MOST_ITEMS:,} items, letters and bytes")


def _plain(value: Any, known: dict[int, _Content], above: int = 0) -> _Content:
    """Replace tuples and arrays in a value inside `above` containers by lists; `known` has the containers so far."""
    if isinstance(value, _Array):
        value = value.value
    if value is None or isinstance(value, bool | int | float):
        return _Content(value)
    if type(value) in (str, bytes):
        return _Content(value, 1 + len(value))
    if type(value) not in (dict, list, tuple):
        raise _RefusedError(f"it holds a {type(value).__name__.strip('_').lower()}")
    found = known.get(id(value))
    if above + (found.depth if found else 1) > DEEPEST:  # a container that holds itself is as deep
        raise _RefusedError(f"it holds more than {DEEPEST} containers inside each other")
    if found is None:
        items, depth, parts = 1, 0, []
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            content = _plain(part, known, above + 1)
            items, depth = items + content.items, max(depth, content.depth)
            _stop_if_large(items)
            parts.append(content.value)
        plain = dict(zip(parts, parts[len(value) :], strict=False)) if isinstance(value, dict) else parts
        found = known[id(value)] = _Content(plain, items, depth + 1)
    return found


def read_pickle(file: Path) -> Any:
    """Return the content of a pickle of Python 2 or 3: dicts, lists, text, numbers, and lists for tuples and arrays.

    Raises:
        DataError: the pickle holds anything else, is too large, or is damaged.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise _RefusedError(f"it has more than {MOST_BYTES:,} bytes")
        return _plain(_Interpreter().run(content), {}).value
    except Exception as error:  # a damaged pickle raises many types
        raise DataError(
            [
                f"a ground truth must be a pickle of plain containers, text, numbers and NumPy arrays, but {file} is "
                f"not: {error or type(error).__name__}; nothing in it was run, get the file from its authors"
            ]
        ) from error
