"""The command: it prints the prompt and what a loop without a cache would add, by bytes and by BPE."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.open_run import OpenRun, open_run
from tests.support.runs import ROOT, run_on
from tests.support.tool_runs import SMALL, bpe_corpus, bpe_run, byte_run
from tools import generate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_run(tmp_path_factory.mktemp("bytes"), "experiment=moe_spannorm")


@pytest.fixture(scope="module")
def run_on_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    return bpe_run(folder, bpe_corpus(folder), "model.placement=siamesenorm")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    generate.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def greedy(opened: OpenRun, text: str, num_tokens: int) -> str:
    """By the model's plain forward pass, up to the end of the document."""
    tokenizer = opened.datamodule.tokenizer
    tokens = tokenizer.encode(text.encode()).tolist()
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens.append(int(opened.module(torch.tensor([tokens]))[0][0, -1].argmax()))
        if tokens[-1] == tokenizer.end_of_document:
            return tokenizer.decode(tokens[:-1])
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("prompt", ["def ", "é ${x} ??? \\n=\"'\t<|endoftext|> 🙂"])
@pytest.mark.parametrize("which", ["run", "run_on_bpe"])
def test_greedy_is_the_plain_forward_pass(
    which: str, prompt: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(which)
    out, err = call(capsys, folder, f"prompt={prompt}", "temperature=0", "num_tokens=10", "window=64")
    assert out == greedy(open_run(folder), prompt, 10) + "\n"
    assert out.startswith(prompt)
    assert err == ""


def test_the_seed_decides(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (call(capsys, run, f"seed={seed}", "temperature=2")[0] for seed in (1, 1, 2))
    assert first == again != other
    assert call(capsys, run, "prompt=a", "top_k=1") == call(capsys, run, "prompt=a", "temperature=0")
    assert call(capsys, run, "prompt=a", "top_p=0.001") == call(capsys, run, "prompt=a", "temperature=0")


def test_of_a_prompt_longer_than_the_context_the_end_counts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 60 + "def main(arguments): " * 2
    out, err = call(capsys, run, f"prompt={long}", "temperature=0", "num_tokens=5")
    assert err == f"The prompt has {len(long)} tokens; the model sees the last 48 of them.\n"
    last, _ = call(capsys, run, f"prompt={long[-48:]}", "temperature=0", "num_tokens=5")
    assert out == long[:-48] + last


def test_an_empty_prompt_begins_a_document_and_its_end_ends_the_text(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def stream(model: object, prompts: list[list[int]], *_: object) -> list[list[int]]:
        given.extend(prompts)
        return [[104], [105], [256], [106]]

    monkeypatch.setattr("lightning_modules.generation.stream", stream)
    assert call(capsys, run) == ("hi\n", "")
    assert given == [[256]]


def test_characters_come_whole() -> None:
    tokenizer = type("Bytes", (), {"decode": staticmethod(lambda tokens: bytes(tokens).decode("utf-8", "replace"))})
    pieces = list(generate.as_text(list(b"a"), b"\xc3\xa9b\xff!\xf0\x9f", tokenizer))
    assert pieces == ["a", "", "é", "b", "", "\N{REPLACEMENT CHARACTER}!", "", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.slow
def test_on_a_terminal_control_characters_are_symbols(run: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tools.generate", str(run), "prompt=\x1b[2J\tx", "num_tokens=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, stdout=theirs, check=True)
    assert os.read(ours, 1000).decode().startswith("␛[2J\tx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}"], "RUN='{tmp}' is not valid: expected the folder of a run, with its config.yaml"),
        (["{run}", "promt=x"], "promt='x' is not valid: no such field; one of allow, checkpoint, num_tokens, "),
        (["{run}", "top_p=0"], "top_p=0.0 is not valid: expected a number in (0, 1]"),
        (["{run}", "num_tokens=many"], "num_tokens='many' is not valid: expected an integer"),
        (["{run}", "hello"], "argument='hello' is not valid: expected FIELD=VALUE"),
        (["{run}", "checkpoint=first"], "checkpoint='first' is not valid: expected last, best, or the path of a"),
        (["{run}", "checkpoint={run}/config.yaml"], "expected a whole checkpoint; this file cannot be read as one"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(run=run, tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        generate.cli.run(lambda: generate.main(filled))
    err = capsys.readouterr().err
    assert message.format(run=run, tmp=tmp_path) in err
    assert err.count("\n") == 1


def test_a_run_on_numbers_goes_on_with_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the last of num_tokens: no number ends a document."""
    folder = run_on(tmp_path, *SMALL[:1], "data=synthetic", "data.seq_len=31", "data.vocab_size=4")
    out, _ = call(capsys, folder, "prompt=3 1", "num_tokens=40", "temperature=1")
    numbers = out.split()
    assert numbers[:2] == ["3", "1"]
    assert len(numbers) == 42
    assert set(numbers) == {"0", "1", "2", "3"}
    for prompt in ("", "def", "3 4", "-1"):
        with pytest.raises(SystemExit, match="2"):
            generate.cli.run(lambda prompt=prompt: generate.main([str(folder), f"prompt={prompt}"]))
        assert f"prompt={prompt!r} is not valid: expected numbers from 0 to 3" in capsys.readouterr().err


def test_a_model_that_diverged_is_said_to_be_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    content["state_dict"]["model.head.weight"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(SystemExit, match="2"):
        generate.cli.run(lambda: generate.main([str(run), "prompt=x", f"checkpoint={tmp_path}/nan.ckpt"]))
    assert capsys.readouterr().err == "Error: no text: the model's output is not finite\n"


def test_a_run_from_elsewhere_runs_no_code_of_its_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (run / "config.yaml").read_text()
    (tmp_path / "theirs.py").write_text(f"open('{tmp_path}/ran', 'w')\nclass Data: pass\n")
    theirs = text.replace("datamodules.python_stdlib.PythonStdlib", "theirs.Data")
    assert theirs != text
    (tmp_path / "config.yaml").write_text(theirs)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        generate.cli.run(lambda: generate.main([str(tmp_path), "prompt=x"]))
    assert "data._target_='theirs.Data' is not valid" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
