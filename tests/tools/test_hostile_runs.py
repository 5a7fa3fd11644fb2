"""Runs from a stranger in tools.runs, tools.compare and tools.replay: listed or refused in a line, shown as text."""

import contextlib
import json
import os
import random
import resource
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from core.errors import UserError
from core.status import is_locked, is_running, read, read_summary
from core.untrusted import MIB, Untrusted
from tests.support.forked import python
from tests.support.runs import Finished
from tools.curves import read_curves
from tools.runs import find, look

EVIL = "\x1b]0;owned\x07\x1b[2J[/x][red]\u202egpj $\\frac"


def make_run(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, content in {"config.yaml": "", **files}.items():
        (folder / name).write_text(content)
    return folder


def tool(cwd: Path, name: str, *arguments: str) -> Finished:
    return python(
        cwd, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'x'\n{RUN.format(name)}", *arguments
    )


ROOT = Path(__file__).parents[2]
RUN = "import runpy; runpy.run_module('tools.{}', run_name='__main__')"


def test_names_and_reasons_are_text(tmp_path: Path) -> None:
    """In a process of its own, whose output is that of a pipe and, asked for, that of a terminal."""
    status = {"status": "failed", "step": 3, "reason": EVIL * 200}
    make_run(tmp_path / "runs" / EVIL.replace("/", "-"), **{"status.json": json.dumps(status)})
    make_run(tmp_path / "runs/[" / "]", **{"status.json": json.dumps({"status": EVIL, "reason": EVIL})})
    ended = tool(tmp_path, "runs")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert "[red]" in ended.out
    assert r"\x1b]0;owned\x07" in ended.out.replace("\n", "")
    assert not set(ended.out) & {"\x1b", "\x07", "\u202e", "\r"}
    assert len(ended.out) < 20_000
    nothing = tool(tmp_path, "runs", "runs/[", "status=running")
    assert nothing.out == "No such runs in runs/[.\n"
    refused = tool(tmp_path, "runs", f"no{EVIL}")
    assert refused.code == 2
    assert not set(refused.err) & {"\x1b", "\x07", "\u202e"}


def test_a_record_over_many_lines_is_refused_before_it_is_built(tmp_path: Path) -> None:
    table = tmp_path / "csv/version_0/metrics.csv"
    table.parent.mkdir(parents=True)
    table.write_text('step,a\n0,1\n"x\n' + 'yz","x\n' * 200_000 + '"\n')
    tracemalloc.start()
    with pytest.raises(Untrusted, match=r"metrics\.csv cannot be read as a table of curves: unexpected end of data"):
        read_curves(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


def test_a_table_is_read_as_csv_has_it(tmp_path: Path) -> None:
    """Short, long and empty rows, quotes and a row that is still being written."""
    table = tmp_path / "csv/version_0/metrics.csv"
    table.parent.mkdir(parents=True)
    table.write_text('step,"a ""b"", c",d\r\n0,1,\r\n\r\n1,,2\r\n2\r\n3,4,5,6\r\n4,7')
    assert read_curves(tmp_path) == {'a "b", c': ([0, 3], [1.0, 4.0]), "d": ([1, 3], [2.0, 5.0])}


def fifo(path: Path) -> None:
    os.mkfifo(path)


ODD_FILES: dict[str, Callable[[Path], Any]] = {
    "pipe": fifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "circle": lambda path: path.symlink_to(path),
    "dangling": lambda path: path.symlink_to(path.with_name("nothing")),
    "deep": lambda path: path.write_text("[" * 5000 + "]" * 5000),
    "deep object": lambda path: path.write_text('{"step":' * 5000 + "1" + "}" * 5000),
    "huge": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40),
    "no text": lambda path: path.write_bytes(b"\xff\0\xfe"),
    "empty": Path.touch,
    "list": lambda path: path.write_text("[1]"),
}
VALUES = ("x", "1", [], {}, True, -1, 1.5, 1e400, float("nan"), 2**70, None, EVIL, [[[]]])


@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_files_are_passed_by_at_once(tmp_path: Path, kind: str) -> None:
    for name in ("status.json", "summary.json", "lock", "divergence.md"):
        run = make_run(tmp_path / name)
        ODD_FILES[kind](run / name)
        began = time.monotonic()
        row = look(run, time.time())
        assert row is not None
        assert row.status in ("failed", "diverged", "done")
        assert not is_running(run)
        assert read(run) == {}
        assert time.monotonic() - began < 2
    if kind not in ("dangling", "circle"):
        with pytest.raises(Untrusted, match=r"summary\.json"):
            read_summary(tmp_path / "summary.json")


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_odd_values_are_listed_without(tmp_path: Path, value: Any) -> None:
    fields = ("status", "step", "max_steps", "val_loss", "reason", "train_loss")
    for field in fields:
        run = make_run(tmp_path / field, **{"status.json": json.dumps({"status": "done", "step": 1, field: value})})
        row = look(run, time.time())
        assert row is not None
        assert row.status in ("done", "failed")
    for field in ("steps", "val_loss"):
        run = make_run(tmp_path / f"summary_{field}", **{"summary.json": json.dumps({field: value})})
        assert look(run, time.time()) is not None
    ended = tool(tmp_path, "runs", ".") if value == "x" else None
    assert ended is None or (ended.code == 0 and ended.out.count("│ ") > 8), ended


@pytest.mark.parametrize("field", ["val_loss", "tokens", "bigram_loss", "parameters"])
def test_an_odd_summary_is_refused_with_field_and_value(tmp_path: Path, field: str) -> None:
    for value in ("x", [], True, 1e400, 2**70 if field in ("tokens", "parameters") else {}):
        (tmp_path / "summary.json").write_text(json.dumps({field: value}))
        with pytest.raises(Untrusted, match=rf"summary.json: {field}=.* is not valid: expected (an integer|a finite)"):
            read_summary(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({field: None, "best_checkpoint": EVIL}))
    assert read_summary(tmp_path) == {}


def test_links_in_circles_and_out_of_the_folder_end(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "study/a")
    make_run(tmp_path / "scratch/experiment/b")
    make_run(tmp_path / "scratch/experiment/deep/c")
    for name, target in {".": ".", "up": "..", "root": "/", "proc": "/proc", "self": "study"}.items():
        (runs / f"link_{name}").symlink_to(target)
    (runs / "study/back").symlink_to(runs)
    (runs / "large").symlink_to(tmp_path / "scratch/experiment")
    deep = runs
    for _ in range(300):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "config.yaml").touch()
    began = time.monotonic()
    found = find(runs)
    assert time.monotonic() - began < 20
    assert runs / "study/a" in found, "under its own name, not that of a link"
    assert runs / "large/b" in found, "a folder of runs on another disk"
    assert len(found) == len({path.resolve() for path in found}), "each once"
    assert not [path for path in found if len(path.parts) > len(runs.parts) + 9]


def test_the_number_of_folders_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.runs.MOST", 50)
    for number in range(100):
        (tmp_path / str(number)).mkdir()
    assert find(tmp_path) == []
    assert capsys.readouterr().err == f"Only the first 50 folders below {tmp_path} were looked at.\n"


def test_a_lock_that_is_a_pipe_or_a_link_is_neither_waited_for_nor_followed(tmp_path: Path) -> None:
    from core.run_lock import held

    fifo(tmp_path / "pipe")
    assert not is_locked(tmp_path / "pipe")
    mine = tmp_path / "mine"
    mine.write_text("mine")
    run = make_run(tmp_path / "run")
    (run / "lock").symlink_to(mine)
    with pytest.raises(UserError, match="run_dir="), held(run):
        pass
    assert mine.read_text() == "mine"


# Curves


def frame(content: bytes) -> bytes:
    """An event as TensorBoard frames it."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", len(content))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
    return length + next(checksums) + content + next(checksums)


def event(tag: str, value: float, step: int) -> bytes:
    return Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])).SerializeToString()


def lengthen(number: int) -> bytes:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", number)
    return length + struct.pack("<I", masked_crc32c(length)) + b"x"


EVENT_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an event of 2^60 bytes": (lambda path: path.write_bytes(lengthen(1 << 60)), "the bound is 4,194,304"),
    "one of 8 GiB": (lambda path: path.write_bytes(lengthen(1 << 33)), "the bound is 4,194,304"),
    "a pipe": (fifo, "is no regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    "a dangling link": (lambda path: path.symlink_to("nothing"), "is no regular file"),
    "a step below zero": (lambda path: path.write_bytes(frame(event("t", 1, -5))), "has a step -5"),
    "a step of 2^62": (lambda path: path.write_bytes(frame(event("t", 1, 1 << 62))), "has a step 4611686018427387904"),
    "a file of 5 TiB": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 5 << 40), "READ_LIMITS=10"),
}


@pytest.mark.parametrize("kind", EVENT_FILES)
def test_odd_event_files_are_refused(tmp_path: Path, kind: str) -> None:
    make, reason = EVENT_FILES[kind]
    (tmp_path / "tensorboard").mkdir()
    make(tmp_path / "tensorboard/events.out.tfevents.1.x")
    began = time.monotonic()
    with pytest.raises(Untrusted, match=reason):
        read_curves(tmp_path)
    assert time.monotonic() - began < 10


def test_a_file_that_is_still_written_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    path = tmp_path / "tensorboard/events.out.tfevents.1.x"
    whole = b"".join(frame(event("t", float(step), step)) for step in range(5))
    for cut in range(0, 30):
        path.write_bytes(whole[: len(whole) - cut])
        curves = read_curves(tmp_path)
        assert curves["t"][0] == list(range(5 if cut == 0 else 4))


def test_an_event_file_that_a_crash_has_left_full_of_zeros_is_read_up_to_them(tmp_path: Path) -> None:
    """Of gigabytes that take no room on the disk: nobody goes through them."""
    (tmp_path / "tensorboard").mkdir()
    path = tmp_path / "tensorboard/events.out.tfevents.1.x"
    path.write_bytes(b"".join(frame(event("t", float(step), step)) for step in range(5)))
    os.truncate(path, 3 << 30)
    began = time.monotonic()
    assert read_curves(tmp_path)["t"][0] == list(range(5))
    assert time.monotonic() - began < 10


def test_event_files_have_a_number_of_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.curves.MAX_EVENTS", 9)
    (tmp_path / "tensorboard").mkdir()
    for name, count in (("1", 5), ("2", 4)):
        content = b"".join(frame(event("t", float(step), step)) for step in range(count))
        (tmp_path / f"tensorboard/events.out.tfevents.{name}.x").write_bytes(content)
    read_curves(tmp_path)
    with (tmp_path / "tensorboard/events.out.tfevents.1.x").open("ab") as file:
        file.write(frame(b""))
    with pytest.raises(Untrusted, match="too many events; the bound is 9, and READ_LIMITS=10"):
        read_curves(tmp_path)


def test_an_event_of_many_empty_values_is_counted_before_any_is_used(tmp_path: Path) -> None:
    """Two bytes each in the file, and a hundred in memory."""
    (tmp_path / "tensorboard").mkdir()
    many = Event(step=1, summary=Summary(value=[Summary.Value()] * 1000)).SerializeToString()
    path = tmp_path / "tensorboard/events.out.tfevents.1.x"
    path.write_bytes(b"".join(frame(many) for _ in range(10)))
    assert read_curves(tmp_path) == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.curves.MAX_VALUES", 9_999)
        with pytest.raises(Untrusted, match="event files have too many values; the bound is 9,999, and READ_LIMITS=10"):
            read_curves(tmp_path)


def test_a_wide_table_of_short_rows_is_counted_by_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of two bytes becomes a row of as many cells as there are columns."""
    monkeypatch.setattr("tools.curves.MAX_CELLS", 1_000_000)
    (tmp_path / "csv/version_0").mkdir(parents=True)
    table, header = tmp_path / "csv/version_0/metrics.csv", ",".join(["step", *(f"c{n}" for n in range(99_999))])
    table.write_text(header + "\n" + "1\n" * 10)
    assert read_curves(tmp_path) == {}
    table.write_text(header + "\n" + "1\n" * 11)
    with pytest.raises(Untrusted, match="tables have too many cells; the bound is 1,000,000, and READ_LIMITS=10"):
        read_curves(tmp_path)


def test_tables_have_a_number_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.curves.MAX_VALUES", 3)
    for name, text in (("version_0", "step,a\n1,2\n2,3\n"), ("version_1", "step,a,b\n3,4,\n")):
        (tmp_path / "csv" / name).mkdir(parents=True)
        (tmp_path / "csv" / name / "metrics.csv").write_text(text)
    assert read_curves(tmp_path)["a"] == ([1, 2, 3], [2.0, 3.0, 4.0])
    (tmp_path / "csv/version_1/metrics.csv").write_text("step,a,b\n3,4,5\n")
    with pytest.raises(Untrusted, match="tables have too many values; the bound is 3, and READ_LIMITS=10"):
        read_curves(tmp_path)


def test_scalars_among_histograms_and_texts_are_as_tensorboard_reads_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for part in range(2):  # a run and its resumption, which goes over a step again
        with SummaryWriter(tmp_path / "tensorboard", filename_suffix=f".{part}") as writer:
            for step in range(3 * part, 3 * part + 5):
                writer.add_scalar("loss", 1 / (step + 1 + part), step)
                writer.add_histogram("weights", torch.arange(5.0), step)
                writer.add_text("note", "x", step)
    reference = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected = {event.step: event.value for event in reference.Scalars("loss")}
    assert read_curves(tmp_path) == {"loss": (list(range(8)), [expected[step] for step in range(8)])}


def test_a_table_of_one_line_without_end_is_not_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "csv/version_0").mkdir(parents=True)
    path = tmp_path / "csv/version_0/metrics.csv"
    path.write_text("step,a\n1,2\n")
    os.truncate(path, 3 << 30)
    limit = (256 << 20) + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with pytest.raises(Untrusted, match="a line of more than 1,048,576 characters; the bound is 1,048,576, and READ"):
        read_curves(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < limit


def test_mutated_event_files_are_read_or_refused(tmp_path: Path) -> None:
    """A bit here and there, pieces left out or twice: never another error, never long."""
    with SummaryWriter(tmp_path / "good") as writer:
        for step in range(20):
            writer.add_scalar("train/loss", 1.0 / (step + 1), step)
            writer.add_text("divergence/event", "x", step)
    (path,) = (tmp_path / "good").iterdir()
    good, draw = path.read_bytes(), random.Random(0)
    (tmp_path / "tensorboard").mkdir()
    for _ in range(150):
        content = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            start = draw.randrange(len(content))
            if draw.random() < 0.5:
                content[start] ^= 1 << draw.randrange(8)
            else:
                content[start : start + draw.randint(0, 20)] = draw.randbytes(draw.randint(0, 20))
        (tmp_path / "tensorboard" / path.name).write_bytes(content)
        with contextlib.suppress(UserError):
            read_curves(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1,2\n", "there is no column 'step'"),
        ("step,a\nx,2\n", "invalid literal for int"),
        ("step,a\n1,x\n", "could not convert string to float"),
        ("step,a\n-1,2\n", "step -1 is none of"),
        ("step,a\n" + "9" * 5000 + ",2\n", "step|digits"),
        ("step,a\n1,2,3,4\n", None),
        ("step,a\n1\n", None),
        ("step," + "a" * 200_000 + "\n1,2\n", "field larger than field limit"),
        ("step,a\n1,\0\n", "could not convert|NUL"),
        ("", None),
    ],
)
def test_odd_tables_are_read_or_refused(tmp_path: Path, text: str, reason: str | None) -> None:
    for name in ("version_0", "version_x", "version_²", "version_" + "9" * 30):
        (tmp_path / "csv" / name).mkdir(parents=True)
        (tmp_path / "csv" / name / "metrics.csv").write_text(text if name == "version_0" else "x")
    if reason is None:
        read_curves(tmp_path)
        return
    with pytest.raises(Untrusted, match=rf"version_0/metrics.csv cannot be read as a table of curves: .*({reason})"):
        read_curves(tmp_path)


def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "csv/version_0").mkdir(parents=True)
    fifo(tmp_path / "csv/version_0/metrics.csv")
    with pytest.raises(Untrusted, match="is no regular file"):
        read_curves(tmp_path)


def test_compare_shows_foreign_names_as_text_and_says_what_is_odd(tmp_path: Path) -> None:
    runs = [tmp_path / name / EVIL.replace("/", "-") for name in ("_a", "$\\frac{")]
    for run in runs:
        make_run(run)
        with SummaryWriter(run / "tensorboard") as writer:
            for step in range(3):
                writer.add_scalar(f"[/x]{EVIL}", 1.0, step)
                writer.add_scalar("train/loss", float("inf"), step)
    (runs[0] / "summary.json").write_text(json.dumps({"val_loss": 1.5, "bigram_loss": 2, "resume": EVIL}))
    ended = tool(tmp_path, "compare", *map(str, runs), "output=a.png")
    assert ended.code == 0, ended.err
    assert not set(ended.out) & {"\x1b", "\x07", "\u202e"}
    assert (tmp_path / "a.png").stat().st_size > 1000
    tags = tool(tmp_path, "compare", *map(str, runs), f"tags=[/x]{EVIL}", "output=b.png")
    assert tags.code == 0, tags.err
    (runs[0] / "summary.json").write_text('{"val_loss": "x"}')
    odd = tool(tmp_path, "compare", *map(str, runs), "output=c.png")
    assert odd.code == 2
    assert odd.err.startswith("Error: ")
    assert odd.err.endswith("val_loss='x' is not valid: expected a finite number, or null\n")
    assert odd.err.count("\n") == 1
    assert not set(odd.err) & {"\x1b", "\x07", "\u202e"}
