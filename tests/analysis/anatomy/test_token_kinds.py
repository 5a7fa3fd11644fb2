"""Kinds of tokens, by texts whose kind is plain, with two tokenizers."""

import pytest
import torch

from analysis.anatomy.token_kinds import KINDS, kind_of, token_kinds
from datamodules.tokenizers import ByteTokenizer, NumberTokenizer

TEXTS = {
    "letters": ("a", "The", " word", "naïve", "漢字", "é", "cafe\u0301"),
    "digits": ("7", " 2026", "٣"),
    "whitespace": (" ", "\n", "\t\n  ", "\f", "\u00a0"),
    "punctuation": (".", "->", " $", "(", "€", "_"),
    "mixed": ("x1", "don't", "a b", "(a", "3."),
    "other": ("", "�", "a�", "\x00", "\x7f", "\u200b"),
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in TEXTS.items() for text in texts])
def test_the_kind_of_a_text(kind: str, text: str) -> None:
    assert kind_of(text) == kind


def names(tokens: list[list[int]], tokenizer: object) -> list[list[str]]:
    return [[KINDS[kind] for kind in row] for row in token_kinds(torch.tensor(tokens), tokenizer).tolist()]


def test_bytes() -> None:
    """A byte of a longer character is no text by itself, and a form feed no end of a document."""
    found = names([list(b"a1 \n"), [ord("="), 0xC3, 256, 12]], ByteTokenizer())
    assert found == [["letters", "digits", "whitespace", "whitespace"], ["punctuation", "other", "other", "whitespace"]]


def test_numbers_are_digits_but_for_the_end() -> None:
    assert names([[3, 12, 49]], NumberTokenizer(50)) == [["digits", "digits", "other"]]


def test_words_of_a_vocabulary() -> None:
    class Words:
        end_of_document, vocab_size = 0, 7

        def decode(self, tokens: list[int]) -> str:
            (token,) = tokens
            return ["\f", " the", "ing", " 12", ");", "x2", "�"][token]

    expected = ["other", "letters", "letters", "digits", "punctuation", "mixed", "other"]
    assert names([list(range(7))], Words()) == [expected]
    assert names([[7, 1]], Words()) == [["other", "letters"]], "a mask stands behind the vocabulary"
