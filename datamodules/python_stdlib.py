"""The corpus that every machine has: the running Python's own standard library."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import writing
from datamodules.shards import CorpusError, read_index, write_corpus
from datamodules.token_datamodule import TokenDataModule
from datamodules.tokenizers import ByteTokenizer

VALIDATION_SHARE = 0.05
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOPICS = "pydoc_data/topics"


class PythonStdlib(TokenDataModule):
    """Sources of the standard library (tests left out) and the language reference, as bytes.

    The text differs between Python versions, so the corpus is keyed by the version, and its index holds its hashes.

    Args:
        root: folder under which the corpus is written, once.
        seq_len, batch_size, val_batches, num_workers, seed: see TokenDataModule.
    """

    def __init__(
        self, root: str, seq_len: int, batch_size: int, val_batches: int = 32, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed)
        self.root = Path(root)
        self.save_hyperparameters()

    @property
    def folder(self) -> Path:
        return self.root / f"python_stdlib-{platform.python_version()}-{self.tokenizer.name}"

    def prepare_data(self) -> None:
        if (self.folder / "index.json").exists():
            read_index(self.folder)
            return
        description = {
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.tokenizer.vocab_size,
            "source": f"standard library of Python {platform.python_version()}",
        }
        with writing("data.root", self.root):
            write_corpus(self.folder, documents(self.tokenizer), self.tokenizer.end_of_document, description)


def documents(tokenizer: ByteTokenizer) -> Iterator[tuple[str, bytes, npt.NDArray[np.uint16]]]:
    """(split, text, tokens) of every source file, in order of its path, then of every topic of the reference.

    Raises:
        CorpusError: this Python comes without its sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py"))
    kept = [name for name in names if SKIPPED_FOLDERS.isdisjoint(name.split("/")) and name != f"{TOPICS}.py"]
    if not kept:
        raise CorpusError(f"{library} holds no Python sources; use another interpreter (PYTHON=python3.12 make train)")
    texts = [(name, (library / name).read_bytes()) for name in kept]
    texts += [(f"{TOPICS}/{topic}", text.encode()) for topic, text in sorted(_reference().items())]
    for name, text in texts:
        yield split_of(name), text, tokenizer.encode(text)


def _reference() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return dict(topics)


def split_of(name: str) -> str:
    """train or val, by a hash of the document's name: adding a file moves no other."""
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "val" if fraction < VALIDATION_SHARE else "train"
