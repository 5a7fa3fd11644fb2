"""A text without line ends goes through in pieces, however long it is."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.errors import InvalidValue
from datamodules.preparation.documents import find_inputs
from datamodules.preparation.inspect import verify
from datamodules.storage import LocalFolder, read_index
from tests.support.runs import ROOT

MEBIBYTE, GIBIBYTE = 1 << 20, 1 << 30
MOST = 30 * MEBIBYTE  # resident, beyond that for 1 MiB; a shard is mapped to be summed up, so shards are short
SHORT = (b"first", b"before")  # one is of the training split, one of validation
PREPARE = """
import re, sys
from pathlib import Path
from datamodules.preparation.prepare import PrepareConfig, prepare
made = {"separator": "|", "format": "text", "validation": 0.5, "processes": 1, "shard_tokens": 1 << 20}
prepare(PrepareConfig(sys.argv[1], sys.argv[2], **made))
# Not resource's ru_maxrss: that begins with the peak of the process that started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10)
"""


def write_line(path: Path, num_bytes: int) -> None:
    """A short document for each split, and one that is a line of this length, a hole on the disk.

    A hole is NUL bytes, which only format="text" takes for text.
    """
    with path.open("wb") as file:
        file.write(b"|".join((*SHORT, b"")))
        file.truncate(file.tell() + num_bytes)


def peak_memory(folder: Path, num_bytes: int) -> int:
    """Of a process that prepares the line, in bytes."""
    folder.mkdir()
    write_line(folder / "line.txt", num_bytes)
    command = [sys.executable, "-c", PREPARE, str(folder / "line.txt"), str(folder / "corpus")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    storage = LocalFolder(folder / "corpus")
    index = read_index(storage)
    list(verify(storage, index))
    assert sum(split.num_bytes for split in index.splits.values()) == sum(map(len, SHORT)) + num_bytes
    return int(ended.stdout)


def assert_it_takes_no_memory(tmp_path: Path, num_bytes: int) -> None:
    short, long = (peak_memory(tmp_path / str(size), size) for size in (MEBIBYTE, num_bytes))
    print(f"{short / MEBIBYTE:.0f} MiB for 1 MiB, {long / MEBIBYTE:.0f} MiB for {num_bytes / MEBIBYTE:.0f} MiB")
    assert long < short + MOST


def test_a_line_of_64_mebibytes_takes_no_memory(tmp_path: Path) -> None:
    assert_it_takes_no_memory(tmp_path, 64 * MEBIBYTE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_line_of_two_gibibytes_takes_no_memory(tmp_path: Path) -> None:
    assert_it_takes_no_memory(tmp_path, 2 * GIBIBYTE)


@pytest.mark.slow
def test_two_gibibytes_of_json_in_one_line_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        for _ in range(2048):
            file.write(b"a" * MEBIBYTE)
    pieces: Any = find_inputs([str(tmp_path / "a.jsonl")], "text", None).pieces()
    with pytest.raises(InvalidValue, match="is longer than 64,000,000 bytes; max_record_mb=128 allows more"):
        next(pieces)
