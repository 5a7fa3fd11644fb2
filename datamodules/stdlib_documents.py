"""The documents of the running Python's standard library, and what puts a document into a split. Imports no torch."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datamodules.index import CorpusError

VALIDATION_SHARE = 0.05
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOPICS = "pydoc_data/topics"
SOURCE = f"standard library of Python {platform.python_version()}"


def library_documents() -> Iterator[tuple[str, bytes]]:
    """Yield (name, text) of every source file, in order of its path, then of every topic of the reference.

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
    """Return train or val, by a hash of the document's name or text: adding a document moves no other."""
    fraction = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    return "val" if fraction < validation_share else "train"
