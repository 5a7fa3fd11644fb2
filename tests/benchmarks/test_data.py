"""The data benchmark at sizes that cost nothing: the file holds its three tables."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data
from tests.support.forked import python
from tests.support.runs import tiny_job


class Forking:
    """What it needs of `subprocess`, without the seconds that its processes import."""

    @staticmethod
    def run(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        ended = python(cwd, *command[1:])
        assert ended.code == 0, ended.err
        return subprocess.CompletedProcess(command, 0, ended.out, ended.err)


@pytest.mark.slow
def test_it_runs_and_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOCUMENT", 1 << 12)
    sizes = ["tokens=9000,40000", "window=64", "windows_per_batch=2", "batches=3", "rounds=2"]
    sizes += ["model_steps=3", "documents=100", "vocabulary=300", "prepare_rounds=1"]
    output = tmp_path / "data.md"
    monkeypatch.setattr(data, "subprocess", Forking)
    data.main([*tiny_job(), *sizes, f"output={output}"])
    text = output.read_text()
    for name in ("raw memmap loop", "stream", "stream, 1 worker", "encode_batch", "tools.prepare"):
        assert re.search(rf"\| {name} \| [\d.]+ \| [\d.]+ \|", text), name
    assert re.search(r"first batch: [\d.]+ ms", text)
    own = re.findall(r"\| 0 \| ([\d.]+) \| ([\d.]+) \| \d+ \|", text)
    assert np.array(own, float).shape == (2, 2)


def test_the_raw_loop_reads_windows_of_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOCUMENT", 1 << 12)
    folder = data.make_corpus(tmp_path / "corpus", 9000)
    arguments = data.DataConfig(window=64, windows_per_batch=2)
    rows = np.concatenate(list(data.raw_batches(folder, arguments)))
    tokens = np.load(folder / "train-00000.npy")
    windows = {tokens[start : start + 65].tobytes() for start in range(0, len(tokens) - 64, 64)}
    assert len({row.astype(np.uint16).tobytes() for row in rows} & windows) == len(rows) > 100
