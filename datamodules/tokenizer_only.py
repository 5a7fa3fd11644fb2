"""The DataModule of a model that was imported: a tokenizer, and no corpus."""

from functools import cached_property
from pathlib import Path
from typing import Any

from core.errors import ConfigError, require
from datamodules.samples import Samples
from datamodules.stream_datamodule import StreamDataModule
from datamodules.tokenizer_folder import FILE, read_tokenizer_file
from datamodules.tokenizers import FileTokenizer, NumberTokenizer, Tokenizer


class TokenizerOnly(StreamDataModule):
    """Says how texts become tokens, and refuses to give any.

    Args:
        path: the folder with the tokenizer.json.
        end_of_document: the id of the token that closes documents; None: there is no tokenizer.json, and tokens are
            numbers.
        vocab_size: of those numbers.
        seq_len, batch_size, val_batches, num_workers, seed: see StreamDataModule; what a corpus would be read by.
    """

    def __init__(
        self,
        path: str,
        end_of_document: int | None,
        vocab_size: int,
        seq_len: int,
        batch_size: int,
        val_batches: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(seq_len, batch_size, val_batches, num_workers, seed)
        require(vocab_size >= 2, "data.vocab_size", vocab_size, "an integer >= 2")
        self.path, self.end_of_document, self.num_tokens = path, end_of_document, vocab_size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self.end_of_document is None:
            return NumberTokenizer(self.num_tokens)
        content = read_tokenizer_file(Path(self.path), "data.path")
        if content is None:
            raise ConfigError("data.path", self.path, f"a folder with the {FILE} that was imported")
        return FileTokenizer(content, FILE, self.end_of_document)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def samples(self, split: str) -> Samples:
        raise self._no_corpus()

    @property
    def num_val_samples(self) -> int:
        raise self._no_corpus()

    def prepare_data(self) -> None:
        raise self._no_corpus()

    def _no_corpus(self) -> ConfigError:
        valid = "a prepared corpus: an imported model has no data (python -m tools.prepare tokenizer=FOLDER makes some)"
        return ConfigError("data", None, valid)

    @property
    def stream_identity(self) -> dict[str, Any]:
        return {**super().stream_identity, "corpus": None}
