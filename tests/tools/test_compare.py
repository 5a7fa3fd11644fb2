"""tools.compare: the table's numbers are those of the event files; the picture is drawn; mistakes are said."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from tools.compare import main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two runs of 20 logged steps in one experiment's folder; only the first one ended."""
    folders = [tmp_path / "study" / name for name in ("a", "b")]
    for slope, folder in enumerate(folders, start=1):
        with SummaryWriter(folder / "tensorboard") as writer:
            for step in range(20):
                writer.add_scalar("moe/max_load", float(slope * step), step)
                writer.add_scalar("train/loss", 5.0 - slope * step / 20, step)
    (folders[0] / "summary.json").write_text(json.dumps({"val_loss": 1.2345, "bigram_loss": 2.5, "tokens": 1000}))
    monkeypatch.chdir(tmp_path)
    return [folder.relative_to(tmp_path) for folder in folders]


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    main()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn."""
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


def row_of(out: str, run: Path) -> list[str]:
    (line,) = [line for line in out.splitlines() if str(run) in line]
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


def test_the_table_holds_the_summaries(
    runs: list[Path], drawn: list[Figure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(monkeypatch, *runs, "--output", "curves.png")
    out = capsys.readouterr().out
    assert row_of(out, runs[0]) == ["-", "1.234", "-", "2.5", "1,000", "-"]
    assert row_of(out, runs[1]) == ["-"] * 6
    assert Path("curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axes,) = drawn[0].axes
    curves = {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}
    assert curves["study/a, training"][-1] == pytest.approx(4.05)
    assert curves["study/b, training"][-1] == pytest.approx(3.1)
    assert curves["bigram baseline"] == [2.5, 2.5]


def test_tags_are_averaged_over_the_last_tenth(
    runs: list[Path], drawn: list[Figure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(monkeypatch, *runs, "--tags", "moe/max_load", "train/loss", "--output", "new/curves.png")
    out = capsys.readouterr().out
    assert row_of(out, runs[0]) == ["18.5 (19)", "4.075 (4.1)"]  # of steps 18 and 19
    assert row_of(out, runs[1]) == ["37 (38)", "3.15 (3.2)"]
    assert Path("new/curves.png").exists()
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["moe/max_load", "train/loss"]
    assert list(drawn[0].axes[0].lines[1].get_ydata()) == [2.0 * step for step in range(20)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "Error: nowhere is no run folder: it holds no tensorboard/"),
        (["study/a", "--tags", "moe/max_laod"], "Error: none of the runs has written moe/max_laod"),
    ],
)
def test_a_mistake_is_said(
    runs: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as leaving:
        compare(monkeypatch, *arguments)
    assert leaving.value.code == 2
    assert capsys.readouterr().err.strip() == message


def test_without_matplotlib_the_table_is_there_and_the_picture_says_what_it_needs(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["compare", str(runs[0]), "--output", str(runs[0] / "curves.png")])
    main()
    out, err = capsys.readouterr()
    assert "train loss" in out
    assert err == "No picture: matplotlib is not installed; pip install -r requirements-studies.txt\n"
