"""Pickles are read as data: what plain values are made of comes back, all else is refused, and nothing is large."""

import io
import pickle
import random
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from core import plain_pickle
from core.plain_pickle import Maker, Record, read
from core.untrusted import VARIABLE, Untrusted

VALUES = {
    "numbers": [0, 1, 255, 256, 65536, -1, -(2**31), 2**40, 2**70, -(2**70), 1.5, float("inf"), True, False, None],
    "texts": ["", "a", "ä" * 300, b"", b"\xff\x00", b"x" * 300],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"a": {"b": [{"c": ()}]}, 1: {2, 3}, (1, "x"): "a tuple as a key"},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_what_pickle_wrote_is_read(name: str, protocol: int) -> None:
    known = {
        **{f"{module}.set": Maker(set) for module in ("builtins", "__builtin__")},
        "_codecs.encode": Maker(lambda text, encoding: text.encode(encoding)),
        **{f"{module}.bytes": Maker(bytes) for module in ("builtins", "__builtin__")},
    }
    value = VALUES[name]
    assert read(pickle.dumps(value, protocol), known) == value


def test_what_is_shared_stays_shared() -> None:
    shared = [1]
    first, second = read(pickle.dumps([shared, shared]), {})
    assert first is second


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def ran(*_: Any) -> None:
    raise AssertionError("it ran")


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("evil", [Evil(ran, ()), Evil(print, ("x",)), Evil(bytearray, (1 << 40,)), OrderedDict()])
def test_names_that_are_not_known_are_refused(evil: Any, protocol: int) -> None:
    with pytest.raises(Untrusted, match="which no checkpoint needs"):
        read(pickle.dumps([evil], protocol), {})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\x80\x02]",  # no end
        b"\x80\x02.",  # nothing on the stack
        b"\x80\x02e.",  # no mark
        b"\x80\x02h\x05.",  # never put
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02K\x01K\x02a.",  # appended to a number
        b"\x80\x02K\x01)R.",  # a number is called
        b"\x80\x02K\x01}b.",  # a number gets a state
        b"\x80\x02(K\x01u.",
        b"\x80\x02]K\x01Q.",  # a reference to something outside
        b"I" + b"9" * 5000 + b"\n.",
    ],
)
def test_what_is_no_pickle_is_refused(content: bytes) -> None:
    with pytest.raises(Untrusted):
        read(content, {})


def test_a_class_that_is_known_keeps_its_attributes() -> None:
    """As torch's metadata are read: a state is kept with the record, and given to no class."""
    maker = Maker(lambda *arguments: Record("m.C", arguments))
    with pytest.raises(Untrusted, match="gives a state to a Maker"):
        read(b"\x80\x02cm\nC\nN}\x8c\x08__name__\x8c\x01us\x86b.", {"m.C": maker})
    record = read(b"\x80\x02cm\nC\n)\x81}\x8c\x01aK\x07sb.", {"m.C": maker})
    assert (record.name, record.arguments, record.state) == ("m.C", (), {"a": 7})


def doubled(levels: int) -> Any:
    value: Any = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


def itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def nested(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def repeated_text() -> Any:
    text = "x" * 100_000
    return [text] * 100_000


def keys_of_one_hash() -> Any:
    """-1 and -2 have the same hash, and so have all tuples of them."""
    return {tuple(-1 - (n >> bit & 1) for bit in range(11)): None for n in range(1 << 11)}


def halves(levels: int) -> bytes:
    """A dictionary with one key, a tuple of twice the same tuple, and so on: its hash takes 2^levels steps."""
    twice = b"".join(b"h%ch%c\x86q%c0" % (level, level, level + 1) for level in range(levels))
    return b"\x80\x02K\x01q\x000" + twice + b"}h%cNs." % levels


def complex_keys() -> bytes:
    """All of one hash, which is real + 1000003 * imaginary: a dictionary compares each with all before it."""
    numbers = (b"G" + struct.pack(">d", -1000003.0 * n) + b"G" + struct.pack(">d", float(n)) for n in range(50_000))
    return b"\x80\x02c__builtin__\ncomplex\nq\x000}(" + b"".join(b"h\x00" + two + b"\x86RN" for two in numbers) + b"u."


def called_again(text: int, times: int) -> bytes:
    """One text, made bytes of time and again."""
    again = b"h\x00h\x01R" * times
    body = b"c_codecs\nencode\nq\x000X" + struct.pack("<I", text) + b"x" * text + b"X\x06\x00\x00\x00latin1\x86q\x010"
    return b"\x80\x02" + body + b"](" + again + b"e."


CALLED = {
    "__builtin__.complex": Maker(complex),
    "_codecs.encode": Maker(lambda text, encoding: text.encode(encoding)),
}
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "shared dictionaries": (lambda: pickle.dumps(doubled(40)), "unfolds to too many values; the bound is 2,000,000"),
    "a text many times": (lambda: pickle.dumps(repeated_text()), "unfolds to too many values"),
    "a circle": (lambda: pickle.dumps(itself()), "contains itself"),
    "depth": (lambda: nested(5000), "nested more than 100 levels deep"),
    "keys": (lambda: pickle.dumps(keys_of_one_hash()), "too many tuples as keys"),
    "large keys": (lambda: pickle.dumps({n * (2**61 - 1): 0 for n in range(2, 9)}), "more than 60 bits as a key"),
    "instructions": (lambda: b"\x80\x02" + b"]0" * 2_000_001 + b"N.", "too many instructions; the bound is 4,000,000"),
    "a key of shared halves": (lambda: halves(64), "it has a tuple in a key"),
    "complex keys": (complex_keys, "it has a complex as a key"),
    "bytes made again": (lambda: called_again(1 << 20, 100_000), "makes too many values; the bound is 2,000,000"),
    "sets of a byte each": (lambda: b"\x80\x04](" + b"\x8f" * 700_000 + b"e.", "makes too many values"),
    "small objects": (lambda: called_again(0, 670_000), "makes too many values"),
    "a list that is long": (lambda: b"\x80\x04](" + b"N" * 2_000_001 + b"e.", "unfolds to too many values"),
    "length": (lambda: b"\x80\x02" + b" " * plain_pickle.MAX_BYTES, "too many bytes; the bound is 33,554,432"),
    "a length that is a lie": (lambda: b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0fx.", "it is no pickle"),
}


LONG = {"instructions", "small objects", "a list that is long", "sets of a byte each"}  # seconds each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in BOMBS]
)
def test_what_would_take_long_or_much_is_refused(name: str) -> None:
    make, reason = BOMBS[name]
    content, begin = make(), time.process_time()
    with pytest.raises(Untrusted, match=reason):
        read(content, CALLED)
    assert time.process_time() - begin < 20


def test_the_user_can_raise_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "MAX_VALUES", 10)
    content = pickle.dumps(list(range(15)))
    with pytest.raises(Untrusted, match=f"{VARIABLE}=10 in the environment makes it ten times as large"):
        read(content, {})
    monkeypatch.setenv(VARIABLE, "10")
    assert read(content, {}) == list(range(15))


def test_random_bytes_and_damaged_pickles_end_in_a_refusal() -> None:
    draw = random.Random(0)
    whole = pickle.dumps([VALUES["texts"], {"a": [1, 2.5, None, {"b": (1, 2)}]}], 4)
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            read(bytes(damaged), {})
        except Untrusted:
            continue


def test_it_is_no_slower_than_linear() -> None:
    seconds = []
    for size in (4_000, 40_000):
        buffer = io.BytesIO()
        pickle.dump([{"a": n} for n in range(size)], buffer, 2)
        begin = time.process_time()
        read(buffer.getvalue(), {})
        seconds.append(time.process_time() - begin)
    assert seconds[1] < 30 * max(seconds[0], 0.05)
