"""Text of a Hugging Face dataset, or of its beginning, prepared when a run first asks for it."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from core.errors import ConfigError, require
from core.paths import require_path
from datamodules.preparation.bpe import find_tokenizer, make_tokenizer, wanted_size
from datamodules.preparation.inputs import HUB
from datamodules.preparation.once import prepare_once
from datamodules.preparation.prepare import PrepareConfig
from datamodules.token_datamodule import TokenDataModule
from datamodules.tokenizers import Tokenizer, read_tokenizer

FIELDS = {"input": "data.name", "output": "data.root"}
"""Fields of PrepareConfig whose names here are others."""
LONGEST_NAME = 80


class HubText(TokenDataModule):
    """The texts of a dataset on the Hugging Face hub, from its beginning, in tokens (data=hf data.name=NAME).

    What it is made of is streamed, once, when the first run asks for it; later runs find the corpus below `root`.
    Validation is one document of twenty, by a hash of the text.

    Args:
        name: DATASET or DATASET:SUBSET as the hub names them, or the path of a folder that the datasets library reads.
        root: folder under which the corpus is written.
        seq_len, batch_size, val_batches, num_workers, seed: see StreamDataModule.
        tokenizer: byte, bpe:SIZE (trained on the text), hf:NAME, or the path of a tokenizer.json.
        text_field: the dataset's column that holds the text.
        max_text_mb: read no further than so much text, in 10^6 bytes; null: all of it, which can be terabytes.
        document_mask, shuffle_block: see TokenDataModule.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        name: str,
        root: str,
        seq_len: int,
        batch_size: int,
        val_batches: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: str = "bpe:16384",
        text_field: str = "text",
        max_text_mb: int | None = 500,
        document_mask: bool = False,
        shuffle_block: int | None = None,
    ) -> None:
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed, document_mask, shuffle_block)
        require_path("data.root", root)
        valid = "DATASET or DATASET:SUBSET, one of them"
        require(bool(name.strip(":")) and "," not in name, "data.name", name, valid)
        with _as_data_fields(name):
            made = PrepareConfig(f"{HUB}{name}", root, tokenizer, text_field, max_text_mb=max_text_mb)
        settings = repr((name, tokenizer, text_field, max_text_mb))
        words = re.sub(r"[^\w.-]+", "-", f"{name} {tokenizer}").strip("-.")[-LONGEST_NAME:]
        folder = Path(root) / f"{words}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
        self.dataset, self.preparation = name, replace(made, output=str(folder))
        self.save_hyperparameters()

    @property
    def folder(self) -> Path:
        return Path(self.preparation.output)

    @property
    def _is_here(self) -> bool:
        """Return whether what it is made of is on this machine, which is looked at again when the corpus is there."""
        # What the hub holds, only reading it tells.
        return Path(self.dataset.partition(":")[0]).is_dir() or Path(self.preparation.tokenizer).exists()

    @property
    def fetched_from_hub(self) -> dict[str, str]:
        """Return what preparing it may ask the hub for, by field; a folder's README may name data elsewhere as well."""
        is_made, tokenizer = (self.folder / "index.json").exists(), self.preparation.tokenizer
        found = {} if is_made else {"data.name": self.dataset}
        if tokenizer.startswith(HUB) and (self._is_here or not is_made):
            found["data.tokenizer"] = tokenizer
        return found

    @cached_property
    def vocab_size(self) -> int:
        """The number of tokens, which is known before the corpus is there.

        Raises:
            ConfigError: there is no such tokenizer.
        """
        name = self.preparation.tokenizer
        if name.startswith("bpe:"):
            return wanted_size(name)
        if (self.folder / "index.json").exists():  # then no network is needed
            return self.index.vocab_size
        with _as_data_fields(self.dataset):
            return make_tokenizer(find_tokenizer(name), name, None).vocab_size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.storage, self.index)

    def prepare_data(self) -> None:
        """Read the dataset and write the corpus, unless that is there.

        Raises:
            ConfigError: the dataset cannot be read, has no such field, or too little text; its files, or the
                tokenizer's, are here and have changed since; or the corpus' folder cannot be written to.
        """
        most = self.preparation.max_text_mb
        amount = "all" if most is None else f"the first {most} MB"
        with _as_data_fields(self.dataset):
            prepare_once(self.preparation, f"Preparing {self.folder}: {amount} of {self.dataset}, once", self._is_here)
        found = self.index.vocab_size
        valid = f"a tokenizer of at most {found} tokens: the text has no more pairs"
        require(found == self.vocab_size, "data.tokenizer", self.preparation.tokenizer, valid)


@contextmanager
def _as_data_fields(name: str) -> Iterator[None]:
    """Raise an error about a field of PrepareConfig as one about the field here that it comes from."""
    try:
        yield
    except ConfigError as error:
        if error.field.startswith("data."):
            raise
        if error.field == "validation":
            valid = "a dataset of more texts: one of twenty is for validation, by a hash, and one split has none"
            raise ConfigError("data.name", name, valid) from error
        field = FIELDS.get(error.field, f"data.{error.field}")
        raise type(error)(field, name if field == "data.name" else error.value, error.valid) from error
