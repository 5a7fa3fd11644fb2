"""Names that a stranger has given, of datasets and corpora and in a model's text: a terminal shows them."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from datamodules.preparation.once import prepare_once
from datamodules.preparation.prepare import PrepareConfig
from tools import evaluate, prepare
from tools.compare import Run, make_difference_table
from tools.evaluation.corpora import Loss
from tools.generate import harmless

EVIL = "\x1b]0;owned\x07\u202egpj"
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_what_is_prepared_for_a_run_is_named_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepared(config: PrepareConfig, say: Any) -> None:
        say(f"records of {EVIL}")

    monkeypatch.setattr("datamodules.preparation.once.prepare", prepared)
    prepare_once(PrepareConfig("hf:x", str(tmp_path / "out")), f"Preparing {EVIL}")
    said = capsys.readouterr().out
    assert said == "".join(f"{what} \\x1b]0;owned\\x07\\u202egpj\n" for what in ("Preparing", "records of"))


def test_notes_of_the_tool_name_files_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / f"[red]{EVIL}.csv").write_text("a,b\n" * 100)
    (folder / "b.txt").write_text("b" * 100)
    prepare.main([f"input={folder}", f"output={tmp_path / 'out'}", "validation=0.5", "processes=1"])
    ended = capsys.readouterr()
    assert "[red]\\x1b]0;owned\\x07\\u202egpj.csv the first of them" in ended.err
    assert not STEERING.search(ended.err + ended.out)


def test_corpora_are_named_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    names = (f"a[red]{EVIL}[/red]", "x[/y]", "\\[bold]")
    evaluate.show([Loss(name, 1.0, None, 8, [1.0] * 4) for name in names])
    out = capsys.readouterr().out
    assert out.count("x[/y]") == out.count("\\[bold]") == 2
    assert out.count("a[red]\\x1b]0;owned") == 2
    assert not STEERING.search(out)


def test_runs_that_differ_are_named_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, dim in (("\\[bold]x", 1), ("\\[y", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"dim: {dim}\n")
    monkeypatch.chdir(tmp_path)
    runs: list[Run | Any] = [SimpleNamespace(folder=Path(name)) for name in ("\\[bold]x", "\\[y")]
    Console(width=160).print(make_difference_table(runs))
    assert "\\[bold]x" in capsys.readouterr().out


def test_a_models_text_turns_no_direction_on_a_terminal() -> None:
    turning = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    shown = harmless(f"a\tb\n{turning}\x1b\u200d\u05d0")
    assert not STEERING.search(shown.replace("\t", ""))
    assert shown == "a\tb\n" + turning.encode("unicode_escape").decode() + "␛\u200d\u05d0"
