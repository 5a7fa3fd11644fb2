"""Of a tokenizer.json, vocabulary and merges count; what it can make of a text is bounded."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from datamodules.index import CorpusError
from datamodules.tokenizers import FileTokenizer, SpelledEnd
from tests.support.runs import TEXT
from tests.support.tokenizer_files import END, byte_level, llama_like, unigram, without_bytes
from tools.exporting.tokenizer import to_hugging_face


def opened(path: Path, end: str = END) -> FileTokenizer:
    return FileTokenizer(path.read_bytes(), path.name, Tokenizer.from_file(str(path)).token_to_id(end))


def truncating(library: Any) -> None:
    library.enable_truncation(16)


def padding(library: Any) -> None:
    library.enable_padding(length=5000, pad_id=7)


def templating(library: Any) -> None:
    library.add_special_tokens(["<s>"])
    special = [("<s>", library.token_to_id("<s>"))]
    library.post_processor = processors.TemplateProcessing(single="<s> $A $A", special_tokens=special)


def dropping(library: Any) -> None:
    library.model.dropout = 0.5


@pytest.mark.parametrize("change", [truncating, padding, templating, dropping])
def test_state_beyond_vocabulary_and_merges_changes_no_tokens(change: Any, tmp_path: Path) -> None:
    plain, changed = opened(byte_level(tmp_path / "a.json")), opened(byte_level(tmp_path / "b.json", change))
    text = TEXT[:3000]
    expected = Tokenizer.from_file(str(tmp_path / "a.json")).encode(text.decode(), add_special_tokens=False).ids
    assert plain.encode(text).tolist() == changed.encode(text).tolist() == expected
    in_worker = pickle.loads(pickle.dumps(changed))
    assert in_worker.encode(text).tolist() == expected


@pytest.mark.parametrize("change", [truncating, padding, templating, dropping])
def test_an_exported_tokenizer_has_no_such_state_either(change: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = opened(byte_level(tmp_path / "a.json", change))
    to_hugging_face(ours, 10_000).save_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT[:3000].decode())["input_ids"] == ours.encode(TEXT[:3000]).tolist()
    for text in ("", "a", f"a{END}b"):
        assert theirs(text)["input_ids"] == ours.encode(text.encode()).tolist(), text


@pytest.mark.parametrize("normalized", [False, True])
def test_an_added_token_that_ends_documents_is_spelled_in_a_text(normalized: bool, tmp_path: Path) -> None:
    def add(library: Any) -> None:
        library.add_tokens([AddedToken("<END>", special=False, normalized=normalized), AddedToken("<tab>")])

    ours = opened(byte_level(tmp_path / "a.json", add), "<END>")
    ids = ours.encode(b"a<END>b<tab>").tolist()
    assert ours.end_of_document not in ids
    assert ours.library.token_to_id("<tab>") in ids, "others are what the file makes of them"
    assert ours.decode(ids) == "a<END>b<tab>"
    from transformers import AutoTokenizer

    to_hugging_face(ours, 100).save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a<END>b<tab>")["input_ids"] == ids


@pytest.mark.parametrize("text", ["a</s>b", "</s>", "</s></s>", "a</s>b</s>c</s>", "a</s"])
def test_an_end_that_the_model_finds_in_a_text_is_spelled_too(text: str, tmp_path: Path) -> None:
    ours = opened(unigram(tmp_path / "a.json"), "</s>")
    ids = ours.encode(text.encode()).tolist()
    assert ours.end_of_document not in ids
    assert ours.decode(ids).replace(" ", "") == text


def test_an_end_that_is_an_ordinary_letter_is_refused(tmp_path: Path) -> None:
    ours = opened(byte_level(tmp_path / "a.json"), "q")
    with pytest.raises(SpelledEnd, match=r"end_of_document='q' is not valid: a\.json makes it of ordinary text too"):
        ours.encode(b"1q2")


def test_what_goes_on_a_text_gets_no_space_in_front(tmp_path: Path) -> None:
    ours = opened(llama_like(tmp_path / "a.json"), "</s>")
    whole = ours.encode(b"a word\nand another").tolist()
    first, second = ours.encode_batch([b"a word\n", b"and another"], [False, True])
    assert [*first.tolist(), *second.tolist()] == whole
    assert ours.decode(whole) == "a word\nand another"


def test_metaspace_and_byte_level_put_no_space_there_either(tmp_path: Path) -> None:
    def spaced(library: Any) -> None:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    for path, end in ((unigram(tmp_path / "a.json"), "</s>"), (byte_level(tmp_path / "b.json", spaced), END)):
        ours = opened(path, end)
        alone, continued = ours.encode_batch([b"cab", b"cab"], [False, True])
        assert ours.library.decode(alone.tolist()).strip() == "cab"
        assert ours.library.id_to_token(int(alone[0]))[0] in "▁Ġ"
        assert ours.library.id_to_token(int(continued[0]))[0] == "c"


CYRILLIC = "Это русский текст, и ничего больше. " * 20


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_characters_that_vanish_are_measured(unknown: str | None, tmp_path: Path) -> None:
    ours = opened(without_bytes(tmp_path / "a.json", unknown))
    english, russian = TEXT[:2000], CYRILLIC.encode()
    texts = [english, russian, english + russian]
    losses = ours.measure(texts, ours.encode_batch(texts))
    letters = sum(2 for letter in CYRILLIC if letter.isalpha())
    assert [loss.lost for loss in losses] == [0, letters, letters]
    assert dict(losses[1].characters)["т"] == CYRILLIC.count("т")


def test_nothing_is_lost_where_there_are_bytes(tmp_path: Path) -> None:
    texts = [CYRILLIC.encode(), TEXT, "e\u0301 \U0001f600\n\t ".encode(), b"\xff\xfe latin \xe9"]
    for path, end in ((byte_level(tmp_path / "a.json"), END), (llama_like(tmp_path / "b.json"), "</s>")):
        ours = opened(path, end)
        losses = ours.measure(texts, ours.encode_batch(texts))
        assert [loss.lost for loss in losses] == [0, 0, 0, 0], path.name
        assert [loss.invalid for loss in losses] == [0, 0, 0, 3]


def test_a_lowercasing_tokenizer_changes_capitals_and_not_forms_of_a_letter(tmp_path: Path) -> None:
    def lower(library: Any) -> None:
        library.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])

    ours = opened(byte_level(tmp_path / "a.json", lower))
    loss = ours.measure([b"AbC"], ours.encode_batch([b"AbC"]))[0]
    assert (loss.lost, dict(loss.characters)) == (2, {"A": 1, "C": 1})
    decomposed = "e\u0301".encode()
    assert ours.measure([decomposed], ours.encode_batch([decomposed]))[0].lost == 0


def doubling(library: Any) -> None:
    library.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)


def doubling_by_pattern(library: Any) -> None:
    library.normalizer = normalizers.Sequence([normalizers.Replace(Regex("."), "aaaa")] * 20)


def doubling_letters(library: Any) -> None:
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)] * 30)


def doubling_back(library: Any) -> None:
    library.decoder = decoders.Sequence([decoders.Replace("a", "aa")] * 40)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (doubling, "its normalizer may make a text 1,099,511,627,776 times as long; at most 4,096 times are taken"),
        (doubling_by_pattern, "its normalizer may make a text"),
        (doubling_letters, "its pre_tokenizer may make a text 1,073,741,824 times as long; at most 16 times"),
        (doubling_back, "its decoder may make a text 1,099,511,627,776 times as long; at most 16 times"),
    ],
)
def test_a_text_does_not_multiply(change: Any, found: str, tmp_path: Path) -> None:
    byte_level(tmp_path / "a.json", change)
    with pytest.raises(CorpusError, match=rf"{found}.*datamodules/tokenizer_file\.py raises it"):
        opened(tmp_path / "a.json")


def test_what_may_multiply_is_watched(tmp_path: Path) -> None:
    def change(library: Any) -> None:
        library.normalizer = normalizers.Sequence([normalizers.Replace("q", "qqq")] * 7)

    ours = opened(byte_level(tmp_path / "a.json", change))
    assert ours.encode(b"without that letter").size
    with pytest.raises(CorpusError, match=r"its normalizer makes 1,000 characters 2,187,000; at most 16x are taken"):
        ours.encode(b"q" * 1000)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"vocab": {"zzz": 2**32 - 2}}, "its largest id is 4,294,967,294; at most 16,777,216"),
        ({"continuing_subword_prefix": "#" * 1000}, "its continuing_subword_prefix has 1,000 characters; at most 64"),
    ],
)
def test_vocabularies_are_bounded(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    content = json.loads(byte_level(tmp_path / "a.json").read_text())
    model = content["model"]
    if "vocab" in change:
        model["vocab"] |= change["vocab"]
    else:
        model |= change
        model["merges"], model["vocab"] = [], {"a": 0}
    content["added_tokens"] = []
    with pytest.raises(CorpusError, match=found):
        FileTokenizer(json.dumps(content).encode(), "a.json", 0)


def test_a_file_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.tokenizer_file.LARGEST_FILE", 100)
    with pytest.raises(CorpusError, match="it has 200 bytes; at most 100"):
        FileTokenizer(b" " * 200, "a.json", 0)


@pytest.mark.parametrize("content", [b"[" * 5000, b"{}", b"\xff", b"", b'{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_one_line(content: bytes) -> None:
    with pytest.raises(CorpusError, match=r"the tokenizer a\.json: cannot be read as a tokenizer\.json"):
        FileTokenizer(content, "a.json", 0)


def test_an_endless_regular_expression_is_an_error_and_no_panic(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def change(library: Any) -> None:
        split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])

    ours = opened(byte_level(tmp_path / "a.json", change))
    with pytest.raises(CorpusError, match=r"the tokenizer a\.json: .*retry-limit"):
        ours.encode(b"a" * 40 + b"b")
    assert capfd.readouterr().err == "", "the library itself prints a panic, of several lines"
