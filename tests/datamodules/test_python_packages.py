"""The corpus of installed packages, from two small ones, against what importlib.metadata says is installed."""

import re
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distribution
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from datamodules import package_documents, python_packages
from datamodules.index import CorpusError
from datamodules.package_documents import package_versions
from datamodules.python_packages import PythonPackages
from datamodules.storage import LocalFolder, read_index


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_documents, "TRAINING", ("nbclient", "packaging"))
    monkeypatch.setattr(package_documents, "VALIDATION", ("wheel",))
    monkeypatch.setattr(python_packages, "VOCAB_SIZE", 300)


def texts_of(package: str) -> set[str]:
    """Every text file of a package, by a walk over its folder rather than by its list of files."""
    folder = Path(str(distribution(package).locate_file(package)))
    kept = (path for path in folder.rglob("*") if path.suffix in (".py", ".pyi", ".md", ".rst", ".txt"))
    return {path.read_text() for path in kept if path.stat().st_size}


def documents_of(data: PythonPackages, split: str) -> list[str]:
    tokens = data.split(split).tokens.astype(np.int64)
    ends = np.flatnonzero(tokens == data.tokenizer.end_of_document)
    parts = np.split(tokens, ends + 1)[:-1]
    return [data.tokenizer.decode(part[:-1].tolist()) for part in parts]


def test_training_and_validation_are_whole_packages(small: None, tmp_path: Path) -> None:
    data = PythonPackages(str(tmp_path), seq_len=16, batch_size=2)
    assert data.vocab_size == 300, "before there is a corpus"
    data.prepare_data()
    data.check()
    for split, packages in (("train", ("nbclient", "packaging")), ("val", ("wheel",))):
        documents = documents_of(data, split)
        assert len(documents) == len(set(documents)), "no text twice"
        expected = set().union(*map(texts_of, packages))
        assert set(documents) == expected
    version = distribution("nbclient").version
    assert f"nbclient {version} (BSD" in data.index.source
    assert data.tokenizer.vocab_size == 300
    digest = data.index.digest
    again = PythonPackages(str(tmp_path / "again"), seq_len=16, batch_size=2)
    again.prepare_data()
    assert again.index.digest == digest, "the same bytes wherever it is made"
    assert again.folder.name == data.folder.name


def prepare_here(root: str) -> str:
    package_documents.TRAINING, package_documents.VALIDATION = ("nbclient", "packaging"), ("wheel",)
    python_packages.VOCAB_SIZE = 300
    data = PythonPackages(root, seq_len=16, batch_size=2)
    data.prepare_data()
    return data.index.digest


@pytest.mark.slow
def test_two_runs_that_start_together_wait_for_one_corpus(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        first, second = pool.map(prepare_here, [str(tmp_path)] * 2)
    assert first == second
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert read_index(LocalFolder(folder)).digest == first


def test_a_package_that_is_missing_is_named(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_documents, "TRAINING", ("nbclient", "no-such-package"))
    with pytest.raises(CorpusError, match=r"no-such-package is not installed: pip install -r requirements-dev.txt"):
        PythonPackages(str(tmp_path), seq_len=16, batch_size=2).prepare_data()
    assert not list(tmp_path.iterdir())


def test_what_the_requirements_pin_is_what_is_installed() -> None:
    """Else the corpus would be another one on each machine."""
    root = Path(__file__).resolve().parents[2]
    text = "\n".join(path.read_text() for path in root.glob("requirements*.txt"))
    pins = dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;#]+)", text, re.MULTILINE))
    for line in package_versions():
        name, version, *_ = line.split()
        assert pins[name] == version, f"{name} is in no requirements file in this version"
