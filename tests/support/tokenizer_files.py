"""Small files in the format of Hugging Face's `tokenizers`, of the kinds that differ in what they do to a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.runs import TEXT

END = "<|endoftext|>"


def byte_level(path: Path, change: Callable[[Any], object] = lambda _: None) -> Path:
    """A byte-level BPE of 400 tokens, as it is after a change."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([TEXT.decode()], trainer)
    change(library)
    library.save(str(path))
    return path


def llama_like(path: Path) -> Path:
    """A BPE with bytes to fall back to, no pre-tokenizer, and a space in front of each text."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁a", "or"]
    merges = [("▁", "a"), ("o", "r")]
    vocabulary = {name: number for number, name in enumerate(names)}
    library = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(undo)
    library.add_special_tokens(["<unk>", "</s>"])
    library.save(str(path))
    return path


def unigram(path: Path) -> Path:
    """A Unigram of letters, whose model itself finds `</s>` in a text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrst<>/")]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.save(str(path))
    return path


def without_bytes(path: Path, unknown: str | None) -> Path:
    """A BPE of the letters of English: others become the unknown token, or vanish where there is none."""
    library = Tokenizer(models.BPE(unk_token=unknown))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = [END, *([unknown] if unknown else [])]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    library.train_from_iterator([TEXT.decode()], trainer)
    library.save(str(path))
    return path
