"""Two at a time: preparations of one corpus, and readers of runs that are being written."""

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from datamodules.preparation import prepare as preparation
from datamodules.preparation.inspect import verify
from datamodules.preparation.prepare import PrepareConfig, prepare
from datamodules.storage import LocalFolder, read_index
from datamodules.writer import CorpusWriter
from tests.support.runs import ROOT, TEXT

TOLD = "a folder that no other process is preparing"


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    (tmp_path / "text.txt").write_bytes(TEXT * 20)
    return PrepareConfig(str(tmp_path / "text.txt"), str(tmp_path / "corpus"), separator="\n\n", processes=1)


def assert_whole(config: PrepareConfig) -> None:
    corpus, folder = LocalFolder(Path(config.output)), Path(config.output)
    index = read_index(corpus)
    assert len(list(verify(corpus, index))) == 6
    text = len(TEXT) * 20
    assert 0.9 * text < sum(split.num_bytes for split in index.splits.values()) <= text
    assert not (folder / "lock").exists()
    assert {path.name for path in folder.parent.iterdir()} == {"text.txt", folder.name}, "nothing is left"


def test_two_processes_prepare_one_corpus(config: PrepareConfig) -> None:
    arguments = [f"{name}={getattr(config, name)}" for name in ("input", "output", "processes")]
    command = [sys.executable, "-m", "tools.prepare", *arguments, "separator=\\n\\n"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=240)[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes, said
    for code, words in zip(codes, said, strict=True):
        assert code == 0 or (code == 2 and TOLD in words), words
    assert_whole(config)


def test_who_comes_while_a_preparation_ends_is_told(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = CorpusWriter.finish

    def with_another(writer: CorpusWriter, folder: Path) -> Any:
        with pytest.raises(ConfigError, match=TOLD):
            prepare(config)
        return finish(writer, folder)

    monkeypatch.setattr(CorpusWriter, "finish", with_another)
    prepare(config)
    assert_whole(config)


def test_who_takes_the_lock_of_a_folder_that_is_a_corpus_by_now_is_told(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def after_another(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        prepare(config)
        flock(*arguments)

    monkeypatch.setattr(preparation.fcntl, "flock", after_another)
    with pytest.raises(ConfigError, match=TOLD):
        prepare(config)
    assert_whole(config)
