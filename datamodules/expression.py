"""Measures how much of a text its tokens do not express: unknown, dropped or changed characters, and broken UTF-8."""

import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SAID_LOSS = 0.001
"""The share of a text that may be missing in its tokens before it is said."""
MAX_LOSS = 0.01
"""The share above which a preparation is refused, unless it is allowed."""


class Loss(NamedTuple):
    """The part of a text that is not in its tokens.

    Attributes:
        lost: bytes of characters that decoding does not give back.
        invalid: bytes that are no UTF-8, which were replaced before.
        characters: those that were lost, with how often.
    """

    lost: int = 0
    invalid: int = 0
    characters: tuple[tuple[str, int], ...] = ()


NONE = Loss()


def compare(text: bytes, decoded: str) -> Loss:
    """Hold a text against what its tokens give back; forms of one character that Unicode calls equal are equal.

    Characters are counted, not aligned: what is missing is found, a changed order is not.
    """
    string = text.decode("utf-8", "replace")
    invalid = 0
    if "\N{REPLACEMENT CHARACTER}" in string:
        invalid = len(text) - len(text.decode("utf-8", "ignore").encode())
    if string == decoded:
        return Loss(0, invalid)
    if not string.isascii():
        string, decoded = (unicodedata.normalize("NFC", each) for each in (string, decoded))
    missing = _missing(string, decoded)
    lost = sum(count * len(character.encode("utf-8", "surrogatepass")) for character, count in missing)
    return Loss(min(lost, len(text) - invalid), invalid, missing)


def _missing(string: str, decoded: str) -> tuple[tuple[str, int], ...]:
    before, after = _counts(string), _counts(decoded)
    gone = ((chr(code), count - after.get(code, 0)) for code, count in before.items() if count > after.get(code, 0))
    return tuple(gone)


def _counts(string: str) -> dict[int, int]:
    codes: npt.NDArray[np.uint32] = np.frombuffer(string.encode("utf-32-le", "surrogatepass"), np.uint32)
    values, counts = np.unique(codes, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def describe_loss(lost: int, invalid: int, size: int, characters: Counter[str] | None = None) -> str:
    """Return how much of a text is not in its tokens."""
    share = (lost + invalid) / max(size, 1)
    mostly = f" (mostly {_most_frequent(characters)})" if characters else ""
    unknown = f"{lost:,} bytes of characters that the tokenizer does not have or changes{mostly}"
    return f"{share:.3%} of the text is not in the tokens: {unknown}, {invalid:,} bytes that are no UTF-8"


def _most_frequent(characters: Counter[str], number: int = 4) -> str:
    """Return the characters that were lost most often, for a message."""
    return ", ".join(repr(character) for character, _ in characters.most_common(number))
