"""The documents of the Python packages that this project's requirements pin: sources and texts, some 200 MB.

Whoever has run `make test` has them, and the versions that the requirements files name are the same bytes everywhere.
Imports no torch.
"""

import hashlib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from datamodules.index import CorpusError

TRAINING = (
    "accelerate",
    "datasets",
    "hydra-core",
    "hypothesis",
    "lm-eval",
    "matplotlib",
    "moto",
    "mypy",
    "numpy",
    "omegaconf",
    "pyarrow",
    "pydantic",
    "scipy",
    "setuptools",
    "statsmodels",
    "tensorboard",
    "torch",
    "transformers",
    "wandb",
)
VALIDATION = ("lightning", "optuna", "pytest", "rich", "torchmetrics")
"""Whole packages, so that no text of theirs, nor a near copy of it, is trained on."""
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
PACKAGES = "python_packages"
"""The input of tools.prepare that stands for them."""


def package_documents() -> Iterator[tuple[str, str, bytes]]:
    """Yield (split, name, text) of every text file, in an order that mixes the packages and depends on names alone.

    A text that has come already, as an empty file or a licence, is left out.

    Raises:
        CorpusError: a package is not installed.
    """
    files = [
        (hashlib.sha256(f"{package}/{name}".encode()).digest(), split, f"{package}/{name}", path)
        for split, packages in (("train", TRAINING), ("val", VALIDATION))
        for package in packages
        for name, path in _files(_installed(package))
    ]
    seen = set()
    for _, split, name, path in sorted(files):
        text = path.read_bytes()
        digest = hashlib.sha256(text).digest()
        if text and digest not in seen:
            seen.add(digest)
            yield split, name, text


def package_versions() -> list[str]:
    """Return `name version (licence)` of each package.

    Raises:
        CorpusError: one is not installed.
    """
    found = [(package, _installed(package)) for package in (*TRAINING, *VALIDATION)]
    # What is behind a plus is the build, as torch's +cpu: its Python files are the same.
    return [f"{package} {of.version.partition('+')[0]} ({_licence(of)})" for package, of in found]


def _installed(package: str) -> Distribution:
    try:
        return distribution(package)
    except PackageNotFoundError as error:
        raise CorpusError(f"{package} is not installed: pip install -r requirements-dev.txt") from error


def _files(of: Distribution) -> Iterator[tuple[str, Path]]:
    """Yield the name and place of each text file that the package has installed, its metadata and programs aside."""
    for file in of.files or ():
        kept = file.suffix in SUFFIXES and ".." not in file.parts and ".dist-info" not in file.parts[0]
        path = Path(str(of.locate_file(file)))
        if kept and path.is_file():
            yield file.as_posix(), path


def _licence(of: Distribution) -> str:
    """Return the licence as the package's metadata have it, in one line of at most 60 characters."""
    classifiers = of.metadata.get_all("Classifier", [])
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    stated = [*of.metadata.get_all("License-Expression", []), *named, *of.metadata.get_all("License", [])]
    given = next((licence for licence in stated if licence.strip()), "licence not in its metadata")
    return given.strip().splitlines()[0][:60]
