"""A corpus of some 60 million tokens without a network: the Python packages that the tests need."""

import hashlib
from functools import cached_property
from pathlib import Path

from core.errors import require
from datamodules.package_documents import PACKAGES, package_versions
from datamodules.preparation.once import prepare_once
from datamodules.preparation.prepare import PrepareConfig
from datamodules.storage import LocalFolder, read_index
from datamodules.token_datamodule import TokenDataModule
from datamodules.tokenizers import Tokenizer, read_tokenizer

VOCAB_SIZE = 4096


class PythonPackages(TokenDataModule):
    """Sources and texts of the pinned packages in tokens of a BPE that was trained on them; validation by packages.

    The corpus is keyed by the packages' versions, and its index holds its hashes. docs/data.md lists the packages.

    Args:
        root: folder under which the corpus is written, once, in some minutes.
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

    @cached_property
    def folder(self) -> Path:
        """The corpus' folder.

        Raises:
            CorpusError: a package is not installed.
        """
        versions = hashlib.sha256("\n".join(package_versions()).encode()).hexdigest()[:12]
        return self.root / f"{PACKAGES}-{versions}-bpe{VOCAB_SIZE}"

    @property
    def vocab_size(self) -> int:
        """The number of tokens, which is known before the corpus is there."""
        return VOCAB_SIZE

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.storage, self.index)

    def prepare_data(self) -> None:
        """Write the corpus unless it is there.

        Raises:
            ConfigError: the folder cannot be written to.
            CorpusError: a package is not installed.
        """
        said = f"Preparing {self.folder}: 220 MB of text, some minutes, once"
        prepare_once(PrepareConfig(PACKAGES, str(self.folder), f"bpe:{VOCAB_SIZE}"), said)
        found = read_index(LocalFolder(self.folder)).vocab_size
        require(found == VOCAB_SIZE, "data.root", str(self.root), f"a corpus of {VOCAB_SIZE} tokens; this has {found}")
