"""A corpus' tokenizer as Hugging Face has them."""

from typing import Any

from core.errors import UserError

END = "<|endoftext|>"


def to_hugging_face(tokenizer: Any, max_length: int) -> Any:
    """Return a PreTrainedTokenizerFast with the same ids; None: the data is no text.

    Args:
        tokenizer: one of datamodules.tokenizers.
        max_length: tokens in a sequence of the model's training.
    """
    from datamodules.tokenizer_file import load_library
    from datamodules.tokenizers import ByteTokenizer, FileTokenizer

    if not isinstance(tokenizer, ByteTokenizer | FileTokenizer):
        return None
    end = tokenizer.end_of_document
    try:
        from transformers import PreTrainedTokenizerFast
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-eval.txt") from error
    # Not the file as it is: its truncation, padding and template of special tokens were not used in training.
    library = bytes_as_bpe() if isinstance(tokenizer, ByteTokenizer) else load_library(tokenizer.content, end)
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token=library.id_to_token(end),
        model_max_length=max_length,
        split_special_tokens=True,  # a text that spells out such a token gets its letters, as in training
        clean_up_tokenization_spaces=False,
    )


def bytes_as_bpe() -> Any:
    """Return a byte-level BPE that merges nothing: one token a byte, with the byte's own number."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [
        *range(0x21, 0x7F),
        *range(0xA1, 0xAD),
        *range(0xAE, 0x100),
    ]  # of GPT-2's alphabet: they stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}
    library = Tokenizer(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return library
