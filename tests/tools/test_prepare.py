"""The command: every format, the same bytes however often it was killed and however many processes it had."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from core import cli
from datamodules.shards import open_split
from datamodules.stdlib_documents import split_of
from tests.support.preparing import TEXTS, alive, wait_for
from tests.support.runs import ROOT, train
from tools.prepare import main


def prepare(*arguments: str) -> None:
    cli.run(lambda: main(list(arguments)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "index.json"}


def documents(folder: Path) -> set[bytes]:
    """The texts of a byte corpus, both splits."""
    return {text for name in ("train", "val") for text in documents_of(folder, name)} - {b""}


def documents_of(folder: Path, name: str) -> list[bytes]:
    """The texts of a byte corpus' split, in order, and an empty one at the end."""
    tokens = open_split(folder, name).tokens
    return [bytes(piece[piece < 256].tolist()) for piece in np.split(tokens, np.flatnonzero(tokens == 256))]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input") / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text, "n": n}) + "\n" for n, text in enumerate(TEXTS)))
    return path


def write_formats(folder: Path) -> dict[str, list[str]]:
    """{format: arguments that read TEXTS from it}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.output_stream(folder / "c.jsonl.zst", compression="zstd") as file:
        file.write(lines)
    pq.write_table(pa.table({"id": range(len(TEXTS)), "body": TEXTS}), folder / "d.parquet", row_group_size=7)
    (folder / "e.txt").write_text("<end>".join(TEXTS))
    for place in ("files/deep", "files/.hidden", "hub"):
        (folder / place).mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / f"files/{'deep/' * (number % 2)}{number}.py").write_text(text)
    (folder / "files/.hidden/x.py").write_text("not this one")
    (folder / "hub/train.jsonl").write_bytes(lines)
    body = "text_field=body"
    return {
        "jsonl": [f"input={folder}/a.jsonl", body],
        "gzip": [f"input={folder}/b.jsonl.gz", body],
        "zstd": [f"input={folder}/c.jsonl.zst", body],
        "parquet": [f"input={folder}/d.parquet", body],
        "one text file": [f"input={folder}/e.txt", "separator=<end>"],
        "folder": [f"input={folder}/files"],
        "glob": [f"input={folder}/files/**/*.py"],
        "several": [f"input={folder}/files/deep,{folder}/files/[0-9]*.py"],
        "dataset": [f"input=hf:{folder}/hub", body],
    }


def test_every_format_gives_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-cache"))
    expected = None
    for name, arguments in write_formats(tmp_path).items():
        prepare(*arguments, f"output={tmp_path}/out/{name}", "processes=1", "validation=0.2")
        assert documents(tmp_path / "out" / name) == {text.encode() for text in TEXTS}, name
        validation = sorted(piece for piece in open_split(tmp_path / "out" / name, "val").tokens.tolist())
        expected = expected or validation
        assert validation == expected, "the text decides the split, not its file"


def test_the_number_of_processes_changes_nothing(jsonl: Path, tmp_path: Path) -> None:
    for processes in (1, 3):
        output = f"output={tmp_path}/{processes}"
        prepare(f"input={jsonl}", "text_field=body", "tokenizer=bpe:400", output, f"processes={processes}")
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert (tmp_path / "1/index.json").read_bytes() == (tmp_path / "3/index.json").read_bytes()


@pytest.mark.parametrize("processes", [1, 2])
def test_no_more_text_is_read_than_is_asked_for(processes: int, tmp_path: Path) -> None:
    """Up to the end of the document with which it is reached: of one larger than a piece, too."""
    texts = ["a" * 400_000, "b" * 500_000, "c" * 2_500_000, "d" * 10, "e"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    common = [f"input={tmp_path}/texts.jsonl", "validation=0.5", f"processes={processes}"]
    for most, count in ((1, 3), (3, 3), (4, 5)):
        prepare(*common, f"output={tmp_path}/{most}", f"max_text_mb={most}")
        assert documents(tmp_path / str(most)) == {text.encode() for text in texts[:count]}
    prepare(*common, f"output={tmp_path}/all")
    assert contents(tmp_path / "all") == contents(tmp_path / "4")


def test_a_bpe_is_trained_and_decodes_what_it_encodes(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(f"input={jsonl}", "text_field=body", "tokenizer=bpe:400", f"output={tmp_path}/bpe", "processes=1")
    index = json.loads((tmp_path / "bpe/index.json").read_text())
    assert (index["tokenizer"], index["vocab_size"], index["dtype"]) == ("bpe:400", 400, "uint16")
    again = [f"input={jsonl}", "text_field=body", f"tokenizer={tmp_path}/bpe/tokenizer.json", "processes=1"]
    prepare(*again, f"output={tmp_path}/again")
    tokens = np.load(tmp_path / "bpe/train-00000.npy")
    np.testing.assert_array_equal(tokens, np.load(tmp_path / "again/train-00000.npy"))
    assert len(tokens) < index["splits"]["train"]["num_bytes"] / 1.5
    prepare("inspect", str(tmp_path / "bpe"))
    out = capsys.readouterr().out
    assert "every checksum is right" in out
    assert repr(TEXTS[0][:40])[1:-1] in out, "a decoded sample"


def test_a_text_that_spells_out_a_special_token_does_not_end_the_document(tmp_path: Path) -> None:
    for number, text in enumerate(["a<|endoftext|>b", "plain", *(f"{n} more" for n in range(30))]):
        (tmp_path / f"{number}.txt").write_text(text)
    prepare(f"input={tmp_path}/*.txt", "tokenizer=bpe:300", f"output={tmp_path}/out", "validation=0.3", "processes=1")
    ends = [(open_split(tmp_path / "out", name).tokens == 0).sum() for name in ("train", "val")]
    assert sum(ends) == 32


def test_a_document_larger_than_memory_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.preparation.documents.PIECE_BYTES", 1000)
    texts = ["é" * 5000, "line\n" * 900 + "line", "x" * 1000, "short"] + [f"{n}" for n in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    arguments = [f"input={tmp_path}/a.txt", "separator=\\n\\n", "validation=0.2", "processes=1"]
    prepare(*arguments, f"output={tmp_path}/out")
    assert documents(tmp_path / "out") == {text.encode() for text in texts}
    splits = json.loads((tmp_path / "out/index.json").read_text())["splits"]
    assert splits["train"]["num_documents"] + splits["val"]["num_documents"] == len(texts)


def test_a_long_document_lies_in_one_split_however_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a text file's is cut depends on what stands before it; one that ends the file may even stay whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datamodules.preparation.documents.PIECE_BYTES", 1000)
    short = [f"{n} " * (n + 1) + "short" for n in range(40)] + ["x" * 1000]
    lines = [f"{n} {'line ' * (n % 7)}\n" * (90 + 40 * (n % 9)) + "end" for n in range(40)]
    texts = lines + [chr(ord("a") + n) * (1001 + 300 * n) for n in range(20)]
    mixed = [text for pair in zip(texts, short, strict=False) for text in pair] + texts[len(short) :] + short
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("\n\n".join(texts))
    (tmp_path / "in/b.txt").write_text("\n\n".join(mixed))
    for number, text in enumerate(texts):
        (tmp_path / f"in/{number}.txt").write_text(text)
    (tmp_path / "in/c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "in/d.parquet")
    common = [f"input={tmp_path}/in", "separator=\\n\\n", "validation=0.5", "processes=1", "max_expansion=1000"]
    prepare(*common, f"output={tmp_path}/out")
    train, val = (documents_of(tmp_path / "out", name)[:-1] for name in ("train", "val"))
    assert not set(train) & set(val)
    assert all((train + val).count(text.encode()) == 5 for text in texts)
    assert {text for text in short if split_of(text.encode(), 0.5) == "val"} == {t.decode() for t in val} & set(short)


def test_killed_it_leaves_no_corpus_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """The last input is a pipe that nobody writes to, so that it is certainly at work when it is killed."""
    lines = (json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(15) for text in TEXTS)
    (tmp_path / "a.jsonl").write_text("".join(lines))
    os.mkfifo(tmp_path / "b.txt")
    arguments = [f"input={tmp_path}/a.jsonl,{tmp_path}/b.txt", f"output={tmp_path}/out", "processes=2"]
    command, partial = [sys.executable, "-m", "tools.prepare", *arguments], tmp_path / ".out.partial"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: (partial / "progress.json").exists())
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        finally:
            process.send_signal(signal.SIGKILL)
    assert workers
    assert not (tmp_path / "out").exists()
    assert not (partial / "index.json").exists()
    assert 0 < json.loads((partial / "progress.json").read_text())["pieces"] <= 15 * len(TEXTS)
    wait_for(lambda: not any(alive(pid) for pid in workers))
    for output in ("out", "another"):
        feeder = threading.Thread(target=lambda: (tmp_path / "b.txt").write_text("the end"))
        feeder.start()
        prepare(arguments[0], f"output={tmp_path}/{output}", "processes=1")
        feeder.join()
    assert contents(tmp_path / "out") == contents(tmp_path / "another")
    assert not partial.exists()


def test_worker_processes_start_fast() -> None:
    code = "import sys, tools.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_unfinished_preparation_goes_on_only_with_its_own_settings(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    arguments = [f"input={jsonl}", "text_field=body", f"output={tmp_path}/out", "processes=1"]
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.writer.CorpusWriter.checkpoint", interrupt)
        with pytest.raises(SystemExit):
            prepare(*arguments)
    err = message(capsys, *arguments, "validation=0.2")
    assert "expected the settings and input of the unfinished preparation in" in err
    prepare(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        prepare(*arguments)
    err = capsys.readouterr().err
    return err[err.index("Error: ") :]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["inptu=x"], ("inptu='x'", "no such field", "did you mean input?")),
        (["text_field=txt"], ("text_field='txt'", "line 1 has body, n")),
        (["input=nowhere/*.txt"], ("input='nowhere/*.txt'", "a glob, hf:NAME, python_stdlib or python_packages")),
        (["tokenizer=bpe:12"], ("tokenizer='bpe:12'", "N >= 257")),
        (["tokenizer=nowhere.json"], ("tokenizer='nowhere.json'", "byte, bpe:SIZE, hf:NAME, or the path")),
        (["tokenizer={jsonl}"], ("tokenizer=", "cannot be read as a tokenizer.json")),
        (["end_of_document=x"], ("end_of_document='x'", "null: tokenizer=byte has its own")),
        (["validation=2"], ("validation=2.0", "a number in (0, 1)")),
        (["validation=few"], ("validation='few'", "a number")),
        (["validation=1e-9"], ("validation=1e-09", "gives val documents", "separator=...")),
        (["max_text_mb=0"], ("max_text_mb=0", "an integer in [1, 10^9], or null")),
        (["processes=0"], ("processes=0", "an integer >= 1 or null")),
        (["shard_tokens=1000"], ("shard_tokens=1000", "a multiple of 65536")),
        (["output="], ("output=''", "it has no default")),
        (["output={jsonl}"], ("output=", "a new folder")),
        (["output={jsonl}/x"], ("output=", "a folder that can be written to")),
        (["text"], ("argument='text'", "FIELD=VALUE")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    change: list[str],
    parts: tuple[str, ...],
    jsonl: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = [f"input={jsonl}", "text_field=body", f"output={tmp_path}/out", "processes=1"]
    err = message(capsys, *good, *(argument.format(jsonl=jsonl) for argument in change))
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_corpus_is_made_where_a_link_leads(jsonl: Path, tmp_path: Path, there: bool) -> None:
    """To an empty folder, and to nothing yet."""
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk/corpus").mkdir()
    (tmp_path / "link").symlink_to("disk/corpus")
    prepare(f"input={jsonl}", f"output={tmp_path}/link", "text_field=body")
    prepare(f"input={jsonl}", f"output={tmp_path}/plain", "text_field=body")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "disk/corpus") == contents(tmp_path / "plain")


def test_links_in_a_circle_are_refused_before_anything_is_read(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    said = message(capsys, f"input={jsonl}", f"output={tmp_path}/one", "text_field=body")
    assert "output=" in said
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_a_corpus_that_is_there_stays(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"input={jsonl}", "text_field=body", f"output={tmp_path}/out", "processes=1"]
    prepare(*arguments)
    before = contents(tmp_path / "out")
    prepare(*arguments)
    assert "the corpus in this one was made in another way" in message(capsys, *arguments, "tokenizer=bpe:300")
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
def test_an_input_that_ends_too_early_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_formats(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    err = message(capsys, f"input={tmp_path}/{name}", "text_field=body", f"output={tmp_path}/out", "processes=1")
    assert f"input='{tmp_path}/{name}' is not valid: cannot be read" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["train-00000.npy", "val.documents.npy", "tokenizer.json"])
def test_inspect_finds_a_flipped_bit(
    file: str, jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(f"input={jsonl}", "text_field=body", "tokenizer=bpe:300", f"output={tmp_path}/out", "processes=1")
    content = bytearray((tmp_path / "out" / file).read_bytes())
    content[-2] ^= 4
    (tmp_path / "out" / file).write_bytes(content)
    err = message(capsys, "inspect", str(tmp_path / "out"))
    assert f"{tmp_path}/out/{file} is damaged: its sha256 is not the index's" in err


def test_what_was_prepared_trains(jsonl: Path, tmp_path: Path) -> None:
    prepare(f"input={jsonl}", "text_field=body", "tokenizer=bpe:400", f"output={tmp_path}/bpe", "processes=1")
    sizes = [
        "model.dim=32",
        "model.num_layers=2",
        "model.num_heads=2",
        "data.seq_len=16",
        "data.batch_size=4",
    ]
    sizes += ["trainer.max_steps=2", "trainer.accelerator=cpu", "data.val_batches=1", "run_dir=run"]
    finished = train(tmp_path, "data=shards", f"data.path={tmp_path}/bpe", *sizes)
    assert finished.code == 0, finished.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 4 < summary["train_loss"] < 8  # ln 400 = 6
    val = json.loads((tmp_path / "bpe/index.json").read_text())["splits"]["val"]
    bits = summary["val_loss"] / np.log(2) * val["num_tokens"] / val["num_bytes"]
    assert summary["val_bits_per_byte"] == pytest.approx(bits)
