"""Tells kinds of tokens apart by the text that each stands for, whatever the tokenizer."""

import unicodedata
from typing import Any

import torch
from torch import Tensor

KINDS = ("letters", "digits", "whitespace", "punctuation", "mixed", "other")
"""What a token can be made of. Whitespace around other characters does not count. `mixed` has several of the first
four; `other` is no text by itself: the end of a document, a part of a character, a control character, a mask."""


def kind_of(text: str) -> str:
    """Return the kind of a text: letters with their accents, digits, whitespace, punctuation with all symbols."""
    if not text or "�" in text:
        return "other"
    kinds = {_kind_of_character(character) for character in text.strip() or " "}
    return kinds.pop() if len(kinds) == 1 else "other" if "other" in kinds else "mixed"


def _kind_of_character(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace():
        return "whitespace"
    return {"L": "letters", "M": "letters", "N": "digits", "P": "punctuation", "S": "punctuation"}.get(
        category[0], "other"
    )


def token_kinds(tokens: Tensor, tokenizer: Any) -> Tensor:
    """Return which of KINDS each token is, by its place there; int64, of the tokens' shape.

    Args:
        tokens: ids.
        tokenizer: a datamodules.tokenizers.Tokenizer, which decodes each id by itself.
    """
    ids, places = tokens.unique(return_inverse=True)
    end = tokenizer.end_of_document
    known = range(tokenizer.vocab_size)  # a mask is not
    kinds = [kind_of(tokenizer.decode([each])) if each in known and each != end else "other" for each in ids.tolist()]
    return torch.tensor([KINDS.index(kind) for kind in kinds])[places]
