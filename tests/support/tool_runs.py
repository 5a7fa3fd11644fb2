"""Tiny runs for the tools that open one."""

from pathlib import Path

from datamodules.preparation.prepare import PrepareConfig, prepare
from tests.support.runs import TEXT, run, run_on

SMALL = ("trainer.max_steps=3", "data.seq_len=48")


def byte_run(cwd: Path, *overrides: str) -> Path:
    """A run on the tiny corpus of bytes."""
    return run(cwd, "run", *SMALL, *overrides)


def bpe_corpus(folder: Path, texts: bytes = TEXT, tokenizer: str = "bpe:300") -> Path:
    """A prepared corpus of the text, in pieces, with a vocabulary of 300."""
    (folder / "texts").mkdir(parents=True)
    for n in range(40):
        (folder / f"texts/{n}.txt").write_bytes(texts[n * 1500 : (n + 1) * 1500])
    prepare(PrepareConfig(str(folder / "texts"), str(folder / "corpus"), tokenizer, validation=0.3, processes=1))
    return folder / "corpus"


def bpe_run(cwd: Path, corpus: Path, *overrides: str) -> Path:
    """A run on such a corpus."""
    return run_on(cwd, *SMALL, "data=shards", f"data.path={corpus}", *overrides)
