"""The corpus that every machine has: the running Python's own standard library."""

import platform
from pathlib import Path

from core.errors import writing
from datamodules.index import SPLITS
from datamodules.stdlib_documents import SOURCE, library_documents, split_of
from datamodules.storage import LocalFolder, read_index
from datamodules.token_datamodule import TokenDataModule
from datamodules.writer import remove_left_over, write_corpus


class PythonStdlib(TokenDataModule):
    """Sources of the standard library (tests left out) and the language reference, as bytes.

    The text differs between Python versions, so the corpus is keyed by the version, and its index holds its hashes.

    Args:
        root: folder under which the corpus is written, once.
        seq_len, batch_size, val_batches, num_workers, seed: see StreamDataModule.
        document_mask: see TokenDataModule.

    Attributes:
        tidies: remove what killed processes have left beside the corpus; false where a run from elsewhere names root.
    """

    tidies = True

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
        """Write the corpus unless it is there.

        Raises:
            ConfigError: it would be too short for the configuration, or the folder cannot be written to.
        """
        if self.tidies:
            remove_left_over(self.folder)
        if (self.folder / "index.json").exists():
            read_index(LocalFolder(self.folder))
            return
        tokenizer = self.tokenizer
        description = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "source": SOURCE}
        encoded = [(split_of(name.encode()), text, tokenizer.encode(text)) for name, text in library_documents()]
        for split in SPLITS:
            self.check_length(split, sum(len(tokens) + 1 for name, _, tokens in encoded if name == split))
        with writing("data.root", self.root):
            write_corpus(self.folder, encoded, tokenizer.end_of_document, description)
