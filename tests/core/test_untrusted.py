"""Files that are made to hurt their reader are refused in a line, at once, in little memory; good ones are read."""

import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict, Field

from core.errors import UserError
from core.untrusted import MIB, Untrusted, _memory, parse_json, read_bytes, read_json, read_yaml, within


@contextmanager
def quick_and_small(seconds: float = 5.0, memory: int = 64 * MIB) -> Iterator[None]:
    tracemalloc.start()
    began = time.monotonic()
    try:
        yield
        assert time.monotonic() - began < seconds
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


def pipe(path: Path) -> None:
    os.mkfifo(path)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "No such file"),
    "pipe": (pipe, "is no regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    "folder": (Path.mkdir, "Is a directory"),
    "circle": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "sparse": (
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40),
        "more than 16,777,216 bytes",
    ),
    "growing": (lambda path: path.symlink_to("/proc/self/maps"), ""),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "empty": (Path.touch, ""),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_such_file_is_refused_and_never_waited_for(tmp_path: Path, name: str, read: Any) -> None:
    make, reason = FILES[name]
    path = tmp_path / "file"
    make(path)
    if read is read_yaml and name in ("empty", "growing"):
        pytest.skip("is YAML, or may be")
    reason = reason.replace("16,777,216", "1,048,576") if read is read_yaml else reason
    with quick_and_small(), pytest.raises(Untrusted) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


MANY = {
    "lists": b"[" + b"[]," * (12 << 20) + b"0]",
    "lists in lists": b"[" + b"[[]]," * (8 << 20) + b"0]",
    "objects": b"[" + b'{"":0},' * (4 << 20) + b"0]",
    "numbers": b"[" + b"7," * (16 << 20) + b"0]",
    "texts": b"[" + b'"ab",' * (8 << 20) + b"0]",
}


@pytest.mark.parametrize("kind", MANY)
def test_json_of_many_values_is_refused_before_they_are_made(kind: str) -> None:
    """It would take up to a gigabyte: 5 bytes of JSON are over 100 in Python."""
    with quick_and_small(seconds=10.0, memory=2 * len(MANY[kind])), pytest.raises(Untrusted, match="too many values"):
        parse_json(MANY[kind], "x")


def test_what_stands_in_texts_is_not_counted_as_values() -> None:
    text = json.dumps(['[{,\\"' * (2 << 20), "\n" * (4 << 20)])
    with quick_and_small(seconds=20.0, memory=8 * len(text)):
        assert parse_json(text, "x") == json.loads(text)


@pytest.mark.parametrize(
    "text", [b'[{"a": [1, 2]}, "x"],', b"[1.5, 123456789],", b'{"some key": "some text"},', b"{},"]
)
def test_values_take_no_more_than_is_reckoned_with(text: bytes) -> None:
    """Each is one of many in a list."""
    whole = b"[" + text * 50_000 + b"0]"
    tracemalloc.start()
    value = parse_json(whole, "x")
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(value) > 50_000
    assert taken < 1.1 * _memory(whole) + len(whole)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000 + "]" * 5000,
        "[" * 10**6,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "1" * 10**6,
        '"\\ud800"',
        "{",
        "[1,]",
        "",
    ],
)
def test_json_that_is_too_much_or_none_is_refused(text: str) -> None:
    with quick_and_small(), pytest.raises(Untrusted, match="here cannot be read"):
        parse_json(text, "here")


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "holds the alias"),
        ("a: &a [*a]", "holds the alias"),
        ("a: &a {b: 1}\nc: {<<: *a}", "holds the alias"),
        ("[" * 5000 + "]" * 5000, "maximum nesting depth"),
        ("[" * 10**6, "maximum nesting depth"),
        ("- " * 10**5, "more than 64 levels deep"),
        ("- a\n" * 30_000, "too many values"),
        ("a: " + "1:" * 100_000 + "1", "READ_LIMITS=10"),
        ("a: " + "x" * 10**5, "100,000 characters"),
        (
            "a: !!python/object/apply:os.system [exit 1]",
            "holds the tag tag:yaml.org,2002:python/object/apply:os.system",
        ),
        ("a: !!python/name:os.system", "holds the tag tag:yaml.org,2002:python/name:os.system"),
        ("a: !!pairs [b: c]", "holds the tag tag:yaml.org,2002:pairs; a file of this project has none"),
        ("a: !!omap [b: c]", "holds the tag tag:yaml.org,2002:omap"),
        ("a: !!set {b}", "holds the tag tag:yaml.org,2002:set"),
        ("? !!binary YQ==\n: c", "holds the tag tag:yaml.org,2002:binary"),
        ("a: ! b", "holds the tag !"),
        ("a: [", "did not find expected"),
        ("a: \x00", "cannot be read"),
        ("a: " + "1" * 4000 + "1" * 90, ""),
        ("2001-99-99: 1", "month"),
    ],
)
def test_yaml_that_is_too_much_or_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "file").write_text(text)
    with quick_and_small():
        if not reason:
            read_yaml(tmp_path / "file")
            return
        with pytest.raises(Untrusted, match=reason):
            read_yaml(tmp_path / "file")


def test_a_bound_is_raised_by_one_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    with pytest.raises(Untrusted, match=r"more than 60 bytes; the bound is 60, and READ_LIMITS=10"):
        read_bytes(tmp_path / "file", 60)
    monkeypatch.setenv("READ_LIMITS", "2")
    assert read_bytes(tmp_path / "file", 60) == bytes(100)
    for wrong in ("0", "nan", "x", "-1"):
        monkeypatch.setenv("READ_LIMITS", wrong)
        with pytest.raises(UserError, match=f"READ_LIMITS='{wrong}' is not valid: expected a number"):
            read_bytes(tmp_path / "file", 60)


@dataclass(frozen=True)
class Sized:
    """A schema."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str
    size: Annotated[int, Field(ge=0, le=10)] = 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"size": 1}', "name: Field required"),
        ('{"name": "a", "size": "3"}', "size='3': Input should be a valid integer"),
        ('{"name": "a", "size": true}', "size=True: Input should be a valid integer"),
        ('{"name": "a", "size": 1e18}', "size=1e[+]18: Input should be a valid integer"),
        ('{"name": "a", "size": 1000000000000000000}', "size=1000000000000000000: Input should be less than"),
        ('{"name": "a", "more": 1}', "more=1: Unexpected keyword argument"),
        ('{"name": "' + "x" * 1000 + '", "size": -1}', "size=-1"),
        ("[]", "the whole: Input should be an object"),
    ],
)
def test_a_schema_names_field_and_value(text: str, reason: str) -> None:
    with pytest.raises(Untrusted, match=f"here cannot be read: {reason}") as error:
        parse_json(text, "here", Sized)
    assert len(str(error.value)) < 300


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(plain)
def test_what_is_good_comes_back_as_it_was(value: Any) -> None:
    assert parse_json(json.dumps(value), "here") == value


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.lists(st.text(st.characters(codec="utf-8")))))
def test_good_yaml_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "good.yaml"
    path.write_text(yaml.safe_dump(value))
    assert read_yaml(path) == value


def test_a_link_out_of_a_folder_is_no_place_to_write_to(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run / "checkpoints", elsewhere):
        folder.mkdir(parents=True)
    (run / "evaluation").symlink_to(elsewhere)
    (run / "inner").symlink_to("checkpoints")
    (tmp_path / "linked").symlink_to(run)
    for inside in (run / "checkpoints/new", run / "inner/new", tmp_path / "linked/checkpoints/new"):
        assert within(run, inside, "x") == inside
    for outside in (run / "evaluation/step_3/new", run / "evaluation", run / "../elsewhere/new"):
        with pytest.raises(Untrusted, match="by a link: nothing is written there; remove it"):
            within(run, outside, "remove it")
