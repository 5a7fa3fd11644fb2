"""The corpus that every machine has: the running Python's own standard library."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from core.errors import writing
from datamodules.index import CorpusError
from datamodules.storage import LocalFolder, read_index
from datamodules.token_datamodule import TokenDataModule
from datamodules.writer import write_corpus

VALIDATION_SHARE = 0.05
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOPICS = "pydoc_data/topics"
SOURCE = f"standard library of Python {platform.python_version()}"


class PythonStdlib(TokenDataModule):
    """Sources of the standard library (tests left out) and the language reference, as bytes.

    The text differs between Python versions, so the corpus is keyed by the version, and its index holds its hashes.

    Args:
        root: folder under which the corpus is written, once.
        seq_len, batch_size, val_batches, num_workers, seed: see StreamDataModule.
        document_mask: see TokenDataModule.
    """

    def __init__(
        self,
        root: str,
        seq_len: int,
        batch_size: int,
        val_batches: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        document_mask: bool = False,
    ) -> None:
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed, document_mask)
        self.root = Path(root)
        self.save_hyperparameters()

    @property
    def folder(self) -> Path:
        return self.root / f"python_stdlib-{platform.python_version()}-{self.tokenizer.name}"

    def prepare_data(self) -> None:
        if (self.folder / "index.json").exists():
            read_index(LocalFolder(self.folder))
            return
        tokenizer = self.tokenizer
        description = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "source": SOURCE}
        encoded = ((split_of(name.encode()), text, tokenizer.encode(text)) for name, text in library_documents())
        with writing("data.root", self.root):
            write_corpus(self.folder, encoded, tokenizer.end_of_document, description)


def library_documents() -> Iterator[tuple[str, bytes]]:
    """(name, text) of every source file, in order of its path, then of every topic of the reference.

    Raises:
        CorpusError: this Python comes without its sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py"))
    kept = [name for name in names if SKIPPED_FOLDERS.isdisjoint(name.split("/")) and name != f"{TOPICS}.py"]
    if not kept:
        raise CorpusError(f"{library} holds no Python sources; use another interpreter (PYTHON=python3.12 make train)")
    for name in kept:
        yield name, (library / name).read_bytes()
    for topic, text in sorted(_reference().items()):
        yield f"{TOPICS}/{topic}", text.encode()


def _reference() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return dict(topics)


def split_of(key: bytes, validation_share: float = VALIDATION_SHARE) -> str:
    """train or val, by a hash of the document's name or text: adding a document moves no other."""
    fraction = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    return "val" if fraction < validation_share else "train"
