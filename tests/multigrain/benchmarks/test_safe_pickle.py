"""Pickles: what they may hold is read, whoever wrote it; what they may not is refused and not run."""

import os
import pickle
import pickletools
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multigrain.benchmarks import safe_pickle
from multigrain.benchmarks.safe_pickle import MOST_BYTES, read_pickle
from multigrain.errors import DataError


def read(folder, content):
    (folder / "truth.pkl").write_bytes(content)
    return read_pickle(folder / "truth.pkl")


VALUES = {
    "text": "façade",
    "bytes": b"\x00\xff",
    "numbers": [1, -(2**70), 2.5, True, None],
    "nested": [{"a": [{"b": []}]}],
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


PARTS = [operation.code.encode("latin1") for operation in pickletools.opcodes]
PARTS += [b"K\x01", b"\x8c\x01a", b"U\x01a", b"h\x00", b"q\x00", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"."]


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
        {1, 2},
        bytearray(b"a").__class__,
        2**200,
        {(1, 2): 3},
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


def laughs(start, step, end, count):
    """A container that holds the one before twice, and so on: 2 ** count parts from a few bytes."""
    return b"\x80\x04" + start + b"".join(step(index) for index in range(count)) + end + b"."


def lists(index):
    return b"q" + bytes([index]) + b"]" + b"(h" + bytes([index]) + b"h" + bytes([index]) + b"e"


def tuples(index):
    return b"q" + bytes([index]) + b"h" + bytes([index]) + b"\x86"


DTYPE = b"cnumpy\ndtype\n\x8c\x02%s\x85R"
SHAPED = b"\x80\x04cnumpy.core.numeric\n_frombuffer\n(%s" + DTYPE % b"i8" + b"%s\x8c\x01CtR."
LONG_TEXT = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x00"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85R"
HOSTILE = {
    "laughs of lists": laughs(b"]", lists, b"", 40),
    "laughs of tuples": laughs(b")", tuples, b"", 60),
    "a key of laughs of tuples": laughs(b"})", tuples, b"Ns", 60),
    "laughs of text": b"\x80\x04(" + LONG_TEXT + b"h\x00" * 100 + b"l.",
    "laughs of one array": b"\x80\x04("
    + RECONSTRUCT
    + b"q\x00(K\x01J\x00\x00\x01\x00\x85"
    + DTYPE % b"i1"
    + b"\x89"
    + b"B"
    + struct.pack("<I", 2**16)
    + b"a" * 2**16
    + b"tb"
    + b"h\x00" * 100
    + b"l.",
    "copies of one text": b"\x80\x04("
    + LONG_TEXT
    + b"c_codecs\nencode\nq\x01"
    + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 100
    + b"l.",
    "a deep list": b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "a deep tuple": b")" + b"\x85" * 10**5 + b".",
    "a dict that holds itself": b"}q\x00I1\nh\x00s.",
    "text of 4 GB": b"X\xff\xff\xff\xffa.",
    "bytes of 2 ** 60": b"\x8e" + struct.pack("<Q", 2**60) + b"a.",
    "an array of 2 ** 60 bytes": b"\x96" + struct.pack("<Q", 2**60) + b"a.",
    "a memo of 4 GB": b"Nr\xff\xff\xff\xffr\xff\xff\xff\x7fC",
    "a long number": b"\x8b" + struct.pack("<i", 10**5) + b"\x7f" * 10**5 + b".",
    "a longer number": b"I" + b"9" * 10**5 + b"\n.",
    "a shape of many lists": SHAPED % (b"C\x00", b"J\xff\xff\xff\x7fK\x00\x86"),
    "a shape below zero": SHAPED % (b"C\x08aaaaaaaa", b"J\xff\xff\xff\xff\x85"),
    "a shape of many sides": SHAPED % (b"C\x08aaaaaaaa", b"(" + b"K\x01" * 10**4 + b"t"),
    "a wide dtype": b"cnumpy\ndtype\n\x8c\x0aU999999999\x85R.",
    "a function's state": b"c_codecs\nencode\nN}\x8c\x0c__defaults__Ns\x86b.",
    "a list's state": b"]}\x8c\x01aK\x01sb.",
    "a long name": b"c" + b"a" * 10**6 + b"\nb\n.",
    "a class made": b"cnumpy\nndarray\n)\x81.",
    "an instance": b"(inumpy\nndarray\n.",
    "a persistent name": b"Px\n.",
    "an extension": b"\x82\x01.",
    "below the mark": b"K\x01(a.",
    "many marks": b"(" * 10**5 + b".",
    "nothing": b"0.",
    "two values": b"NN.",
    "a large file": b"N" * MOST_BYTES + b".",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_pickle_ends_in_one_error_in_little_memory(tmp_path, content):
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"truth\.pkl is not") as caught:
            read(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < 40 * MOST_BYTES
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000


def test_operations_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MOST_ITEMS", 100)
    assert read(tmp_path, b"(" + b"N" * 97 + b"l.") == [None] * 97
    with pytest.raises(DataError, match="more than 100 items"):
        read(tmp_path, b"(" + b"N" * 98 + b"l.")


def test_what_takes_no_memory_is_no_attack(tmp_path):
    assert read(tmp_path, b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.") is None  # a frame's size is a hint
    assert read(tmp_path, SHAPED % (b"C\x00", b"K\x00J\xff\xff\xff\x7f\x86")) == []


def test_what_is_shared_within_the_limits_is_read(tmp_path):
    part, array = ["easy"], np.arange(3)
    value = [part, part, array, array, {"a": part}]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert read(tmp_path, pickle.dumps(value, protocol)) == [part, part, [0, 1, 2], [0, 1, 2], {"a": part}]


@given(st.binary(max_size=60) | st.lists(st.sampled_from(PARTS), max_size=30).map(b"".join))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path, content):
    try:
        value = read(tmp_path, content)
    except DataError:
        return
    assert value is None or isinstance(value, (bool, int, float, str, bytes, list, dict))
