"""Reading of pickles of ground truth without running any code in them.

A pickle names functions to call while it is read, and may name any function. This reader has its own versions of the
few functions that plain containers and NumPy arrays need, and refuses every other name.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multigrain.errors import DataError

_KINDS = "biufU"
"""Kinds of NumPy dtypes whose bytes are plain numbers or text."""


class _Type:
    """Stands for a dtype while a pickle is read."""

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: Sequence[Any]) -> None:
        """Take the state of a NumPy dtype: (version, byte order, ...)."""
        self.dtype = self.dtype.newbyteorder(state[1])

    def read(self, content: bytes | str, shape: Sequence[int]) -> NDArray[Any]:
        """Return the array (*shape) from its bytes, which Python 2 wrote as text."""
        if self.dtype.kind not in _KINDS:
            raise pickle.UnpicklingError(f"it holds an array of {self.dtype}")
        raw = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(raw, self.dtype).reshape(shape)


class _Array:
    """Stands for an array while a pickle is read."""

    def __init__(self, *_: object) -> None:
        self.values: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: Sequence[Any]) -> None:
        """Take the state of a NumPy array: (version, shape, dtype, True for Fortran order, content)."""
        _, shape, kind, fortran, content = state
        self.values = kind.read(content, shape[::-1]).T if fortran else kind.read(content, shape)


def _from_buffer(content: bytes, kind: _Type, shape: Sequence[int], order: str, *_: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def _scalar(kind: _Type, content: bytes | str) -> Any:
    return kind.read(content, ()).item()


def _encode(text: str, encoding: str) -> bytes:
    """Rebuild bytes that Python 3 wrote in a protocol of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes encoded as {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Rebuild b"", which Python 3 writes as a call without arguments in a protocol of Python 2."""
    return b""


_KNOWN = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    **{(module, "set"): set for module in ("builtins", "__builtin__")},
    **{(module, "frozenset"): frozenset for module in ("builtins", "__builtin__")},
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return this module's version of a known function, and refuse any other name."""
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return _KNOWN[module, name]


def read_pickle(file: Path) -> Any:
    """Return the content of a pickle of Python 2 or 3: containers, text, numbers, and lists in place of NumPy arrays.

    Raises:
        DataError: the pickle holds anything else, or is damaged.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load())
    except Exception as error:  # a damaged pickle raises many types
        raise DataError(
            [
                f"a ground truth must be a pickle of plain containers, text, numbers and NumPy arrays, but {file} is "
                f"not: {error or type(error).__name__}; nothing in it was run, get the file from its authors"
            ]
        ) from error


def _plain(value: Any) -> Any:
    """Replace arrays by lists."""
    if isinstance(value, _Array):
        return value.values.tolist()
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | set | frozenset | bytes):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
