"""Pickles: what they may hold is read, whoever wrote it; what they may not is refused and not run."""

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from multigrain.benchmarks.safe_pickle import read_pickle
from multigrain.errors import DataError


def read(folder, content):
    (folder / "truth.pkl").write_bytes(content)
    return read_pickle(folder / "truth.pkl")


VALUES = {
    "text": "façade",
    "bytes": b"\x00\xff",
    "numbers": [1, -(2**70), 2.5, True, None],
    "nested": [{"a": [{"b": []}]}],
    "set": {1, 2},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read(tmp_path, protocol):
    assert read(tmp_path, pickle.dumps(VALUES | {"tuple": (1, (2,))}, protocol)) == VALUES | {"tuple": [1, [2]]}


ARRAYS = [
    np.arange(6).reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array([], dtype=np.int64),
    np.array(7),
    np.array([1.5, -2], ">f4"),
    np.array([True, False]),
    np.array([250], np.uint8),
    np.array(["new_1", "é"]),
    np.zeros((2, 0, 3)),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", ARRAYS, ids=str)
def test_arrays_are_read_as_lists(tmp_path, array, protocol):
    assert read(tmp_path, pickle.dumps([array], protocol)) == [array.tolist()]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [np.int64(5), np.float32(0.5), np.bool_(True)], ids=repr)
def test_numpys_numbers_are_read(tmp_path, value, protocol):
    assert read(tmp_path, pickle.dumps({"x": value}, protocol)) == {"x": value.item()}


def text2(content):
    """A `str` as Python 2 writes it: bytes without an encoding."""
    return b"U" + bytes([len(content)]) + content


def int2(number):
    return b"J" + struct.pack("<i", number)


def array2(content, shape, kind):
    """An array as Python 2 and its NumPy write it, with protocol 2."""
    dtype = b"cnumpy\ndtype\n" + text2(kind) + int2(0) + int2(1) + b"\x87R"
    dtype += b"(" + int2(3) + text2(b"<") + b"NNN" + int2(-1) + int2(-1) + int2(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + int2(0) + b"\x85" + text2(b"b") + b"\x87R"
    return array + b"(" + int2(1) + int2(shape) + b"\x85" + dtype + b"\x89" + text2(content) + b"tb"


def test_a_pickle_of_python_2_is_read(tmp_path):
    # {"bbx": float64 array, "ok": int64 array with high bytes, "name": a str in latin1}
    content = b"\x80\x02}("
    content += text2(b"bbx") + array2(np.array([1.5, 200], "<f8").tobytes(), 2, b"f8")
    content += text2(b"ok") + array2(np.array([255, 40000], "<i8").tobytes(), 2, b"i8")
    content += text2(b"name") + text2("façade".encode("latin1")) + b"u."
    assert read(tmp_path, content) == {"bbx": [1.5, 200.0], "ok": [255, 40000], "name": "façade"}


class Touch:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(canary):
    touch = f"touch {canary}"
    yield "system", Touch(os.system, touch)
    yield "exec", Touch(exec, f"open({str(canary)!r}, 'w')")
    yield "eval", {"imlist": [Touch(eval, f"open({str(canary)!r}, 'w')")]}
    yield "open", Touch(open, str(canary), "w")
    yield "getattr", Touch(getattr, Path(canary), "touch")
    yield "load", Touch(np.load, str(canary))
    yield "array function", Touch(np.ndarray.tofile, np.zeros(3), str(canary))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("index", range(7))
def test_nothing_in_a_pickle_is_run(tmp_path, index, protocol):
    canary = tmp_path / "canary"
    name, value = list(attacks(canary))[index]
    content = pickle.dumps(value, protocol)
    with pytest.raises(DataError, match=r"plain containers.* it wants .*nothing in it was run"):
        read(tmp_path, content)
    assert not canary.exists(), name


def test_the_attacks_work_on_an_open_door(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(dict(attacks(canary))["system"]))
    assert canary.exists()


def test_dotted_names_do_not_lead_past_the_door(tmp_path):
    content = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    with pytest.raises(DataError, match=r"it wants numpy\.ndarray\.tofile"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    "value",
    [
        np.array([{}, []], dtype=object),
        np.zeros(1, dtype=[("a", "i4")]),
        np.array([1j]),
        np.array(["2020-01-01"], "M8[D]"),
        OrderedDict(a=1),
        1j,
        Path("x"),
        slice(3),
    ],
    ids=repr,
)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_what_is_no_number_and_no_text_is_refused(tmp_path, value, protocol):
    with pytest.raises(DataError, match=r"plain containers, text, numbers and NumPy arrays"):
        read(tmp_path, pickle.dumps([value], protocol))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not found</html>",
        pickle.dumps(VALUES)[:-5],
        b"cnumpy\ndtype\n.",  # a class of ours, not called
        b"cnumpy\ndtype\n(S'i8'\ntR.",  # a dtype alone
        b"\x80\x02]\x94h\x00a.",  # a list that holds itself
        b"c_codecs\nencode\n(S'a'\nS'zlib'\ntR.",
        b"\x80\x02" + array2(b"\x00" * 8, 2, b"i8") + b".",  # fewer bytes than numbers
        b"\x80\x02" + array2(b"\x00" * 8, 1, b"O8") + b".",  # an address as content
    ],
    ids=range(9),
)
def test_damaged_pickles_are_told(tmp_path, content):
    with pytest.raises(DataError, match=r"truth\.pkl is not"):
        read(tmp_path, content)
