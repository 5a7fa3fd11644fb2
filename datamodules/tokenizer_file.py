"""Opens a tokenizer.json so that a text gives the tokens that its vocabulary, merges and normalization say.

Such a file may hold more: truncation, padding, a template of special tokens, dropout. All of it would change what a
corpus holds or what a prompt is, and is turned off. It may also come from anywhere, so what it can make of a text is
bounded.
"""

import base64
import copy
import json
from collections.abc import Iterable
from typing import Any

LARGEST_FILE = 1 << 28  # bytes
LARGEST_ID = 1 << 24
LARGEST_AFFIX = 64  # characters of what marks the inside or the end of a word
LONGEST_WORD = 10_000  # characters in which WordPiece looks for tokens, in time that grows with their square
GROWTH = 16  # times the length of a text that normalizing may give
MEASURED_GROWTH = 4096  # up to here it is measured on every text whether it stays below GROWTH
SLICE = 1 << 14  # characters that are normalized at a time while it is measured


class BadTokenizer(ValueError):
    """A tokenizer.json that is none, or that passes a bound; says which."""


def load_library(content: bytes, end_of_document: int | None = None) -> Any:
    """Return the `tokenizers.Tokenizer` in a tokenizer.json, without state that would change texts.

    Args:
        content: of the file.
        end_of_document: id of the token that closes documents: a text that spells it out gets its letters.

    Raises:
        BadTokenizer: it cannot be read, or passes a bound.
        ModuleNotFoundError: tokenizers is not installed.
    """
    import tokenizers

    _require(len(content) <= LARGEST_FILE, f"it has {len(content):,} bytes", f"{LARGEST_FILE:,}", "LARGEST_FILE")
    try:
        library = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more precise
        raise BadTokenizer(f"cannot be read as a tokenizer.json ({error})") from error
    library.no_truncation()
    library.no_padding()
    library.post_processor = None  # even without special tokens, a template may repeat the text
    for name in ("dropout", "alpha", "nbest_size"):  # of BPE and Unigram: tokens that are drawn
        if getattr(library.model, name, None) is not None:
            setattr(library.model, name, None)
    library.encode_special_tokens = True  # a text that spells out such a token gets its letters
    _check(library)
    if end_of_document is not None and (token := library.id_to_token(end_of_document)) is not None:
        library.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
    if library.decoder is None:
        library.decoder = _matching_decoder(library)
    return library


def vocabulary_size(library: Any) -> int:
    """Return the number that every id is below."""
    return 1 + max(library.get_vocab(with_added_tokens=True).values(), default=-1)


def unknown_token(library: Any) -> int | None:
    """Return the id of what a text becomes that the vocabulary does not have; None: there is no such token."""
    token = getattr(library.model, "unk_token", None)
    if token is not None:
        found: int | None = library.token_to_id(token)
        return found
    unigram = json.loads(library.to_str())["model"] if type(library.model).__name__ == "Unigram" else {}
    identity: int | None = unigram.get("unk_id")
    return identity


def without_prefix(library: Any) -> Any:
    """Return the tokenizer for what goes on a text: it puts nothing in front of it, as many do at a text's beginning.

    Returns the same one where it puts nothing there at all.
    """
    normalizer, pre_tokenizer = state(library.normalizer), state(library.pre_tokenizer)
    changed = _drop_prefix(normalizer), _drop_prefix(pre_tokenizer)
    if changed == (normalizer, pre_tokenizer):
        return library
    content = json.loads(library.to_str())
    content["normalizer"], content["pre_tokenizer"] = changed
    other = type(library).from_str(json.dumps(content))
    other.encode_special_tokens = True
    return other


def measured_growth(library: Any) -> bool:
    """Return whether normalizing may make a text much longer, so that this has to be watched."""
    return _growth(state(library.normalizer)) > GROWTH


def check_growth(library: Any, texts: Iterable[str]) -> None:
    """Raise BadTokenizer where normalizing makes a text too long; takes little memory to find that out."""
    for text in texts:
        length = limit = 0
        for start in range(0, len(text), SLICE):
            part = text[start : start + SLICE]
            length, limit = length + len(library.normalizer.normalize_str(part)), limit + GROWTH * len(part)
            grown = f"its normalizer makes {len(part):,} characters {length:,}"
            _require(length <= limit, grown, f"{GROWTH}x", "GROWTH")


def state(component: Any) -> Any:
    """Return the parts of a normalizer, pre-tokenizer or decoder, as tokenizer.json has them; None: it is not there."""
    return None if component is None else json.loads(component.__getstate__())


def _check(library: Any) -> None:
    largest = vocabulary_size(library) - 1
    _require(largest <= LARGEST_ID, f"its largest id is {largest:,}", f"{LARGEST_ID:,}", "LARGEST_ID")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        length = len(getattr(library.model, name, None) or "")
        _require(length <= LARGEST_AFFIX, f"its {name} has {length:,} characters", str(LARGEST_AFFIX), "LARGEST_AFFIX")
    word = getattr(library.model, "max_input_chars_per_word", 0)
    _require(word <= LONGEST_WORD, f"its max_input_chars_per_word is {word:,}", f"{LONGEST_WORD:,}", "LONGEST_WORD")
    for name, most in (("normalizer", MEASURED_GROWTH), ("pre_tokenizer", GROWTH), ("decoder", GROWTH)):
        growth = _growth(state(getattr(library, name)))
        what = f"its {name} may make a text {growth:,.0f} times as long"
        _require(growth <= most, what, f"{most:,} times", "MEASURED_GROWTH" if most > GROWTH else "GROWTH")


def _require(condition: bool, found: str, bound: str, name: str) -> None:
    if not condition:
        raise BadTokenizer(f"{found}; at most {bound} are taken ({name} in datamodules/tokenizer_file.py raises it)")


def _growth(node: Any) -> float:
    """Return how many times as long, in bytes, a component can make a text, at most.

    Compatibility decomposition (NFKC and the like) is left out: 11 times as long at most, however often it is done.
    """
    if not isinstance(node, dict):
        return 1.0
    kind, growth = node.get("type"), 1.0
    for key in ("normalizers", "pretokenizers", "decoders"):
        for child in node.get(key) or ():
            growth *= _growth(child)
    if kind == "Replace":
        found, given = node["pattern"].get("String"), len(node["content"].encode())
        # A regular expression may match nothing, between any two characters.
        growth *= max(1.0, given / len(found.encode())) if found else 1.0 + given
    elif kind == "Prepend":
        growth *= 1.0 + len(node["prepend"].encode())
    elif kind == "Precompiled":
        growth *= _longest_entry(node["precompiled_charsmap"])
    else:
        growth *= {"ByteLevel": 2.0, "BertNormalizer": 3.0, "Metaspace": 3.0}.get(str(kind), 1.0)
    return growth


def _longest_entry(charsmap: str) -> float:
    """Return the longest entry of such a map in bytes: the size of a trie, the trie, and texts, each ended by a NUL."""
    content = base64.b64decode(charsmap)
    return float(max(map(len, content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")), default=1) or 1)


def _drop_prefix(node: Any) -> Any:
    """Return the same component, but for what it puts in front of a text."""
    if not isinstance(node, dict):
        return node
    node = copy.deepcopy(node)
    for key in ("normalizers", "pretokenizers"):
        if key in node:
            node[key] = [child for child in map(_drop_prefix, node[key]) if child is not None]
    if node.get("type") == "Prepend":
        return None
    if node.get("type") in ("Metaspace", "ByteLevel"):
        node.update({key: False for key in ("add_prefix_space",) if key in node})
        node.update({key: "never" for key in ("prepend_scheme",) if key in node})
    return node


def _matching_decoder(library: Any) -> Any:
    """Return the decoder that undoes the pre-tokenizer: files without one have tokens that do not give the text."""
    from tokenizers import decoders

    node = state(library.pre_tokenizer)
    kinds = [child.get("type") for child in (node.get("pretokenizers") or [node])] if isinstance(node, dict) else []
    if "ByteLevel" in kinds:
        return decoders.ByteLevel()
    return decoders.Metaspace() if "Metaspace" in kinds else None
