"""tools.compare: the table's numbers are those of the event files; the picture is drawn; mistakes are said."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from core import cli
from tests.support.runs import run
from tools.compare import Run, main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two runs of 20 logged steps in one experiment's folder; only the first one ended."""
    folders = [tmp_path / "study" / name for name in ("a", "b")]
    for slope, folder in enumerate(folders, start=1):
        with SummaryWriter(folder / "tensorboard") as writer:
            for step in range(20):
                writer.add_scalar("moe/max_load", float(slope * step), step)
                writer.add_scalar("train/loss", 5.0 - slope * step / 20, step)
            writer.add_scalar("val/loss", 3.0, 19)
    (folders[0] / "summary.json").write_text(json.dumps({"val_loss": 1.2345, "bigram_loss": 2.5, "tokens": 1000}))
    monkeypatch.chdir(tmp_path)
    return [folder.relative_to(tmp_path) for folder in folders]


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    cli.run(lambda: main([*map(str, arguments)]))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn."""
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


def row_of(out: str, run: Path, table: int = 0) -> list[str]:
    """The run's cells in the first table, or in the one of its stability, which comes behind it."""
    line = [line for line in out.splitlines() if line.startswith(f"│ {run} ")][table]
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


def test_what_the_runs_differ_in_comes_first(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, rate in zip(runs, (0.01, 0.003), strict=True):
        (folder / "config.yaml").write_text(f"optim: {{lr: {rate}, eps: 1e-8}}\nrun_dir: {folder}\n")
    compare(monkeypatch, *runs)
    out = capsys.readouterr().out
    table = out[: out.index("train loss")]
    assert [cell.strip() for cell in table.splitlines()[3].strip("│ ").split("│")] == ["optim.lr", "0.01", "0.003"]
    assert "eps" not in table
    assert "run_dir" not in table
    (runs[1] / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    compare(monkeypatch, *runs)
    assert "differs in" not in capsys.readouterr().out


def test_the_second_table_says_how_stably_they_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("study/a")
    with SummaryWriter(folder / "tensorboard") as writer:
        for step in range(400):
            writer.add_scalar("train/loss", 3.0 + (step in (250, 251)), step)
            writer.add_scalar("optim/grad_norm", 4.0 if step < 100 else 0.5, step)
        for block, largest in ((1, 7.0), (2, 30.0)):
            writer.add_scalar(f"signal/block_{block}/max", largest, 0)
    with SummaryWriter("study/short/tensorboard") as writer:
        writer.add_scalar("train/loss", 3.0, 0)
    (folder / "config.yaml").write_text("trainer: {gradient_clip_val: 1.0}\n")
    compare(monkeypatch, folder, "study/short")
    out = capsys.readouterr().out
    assert row_of(out, folder, table=1) == ["66.67", "4", "0.25", "30"], "2 spikes in the 300 steps behind the descent"
    assert row_of(out, Path("study/short"), table=1) == ["-"] * 4
    compare(monkeypatch, folder, "tags=train/loss")
    assert "largest activation" not in capsys.readouterr().out


def test_the_table_holds_the_summaries(
    runs: list[Path], drawn: list[Figure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(monkeypatch, *runs)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "Curves: runs/compare.png"
    assert row_of(out, runs[0]) == ["-", "1.234", "2.5", "1,000"]
    assert row_of(out, runs[1]) == ["-"] * 4
    assert Path("runs/compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axes,) = drawn[0].axes
    curves = {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}
    assert curves["study/a, training"][-1] == pytest.approx(4.05)
    assert curves["study/b, training"][-1] == pytest.approx(3.1)
    assert curves["bigram baseline"] == [2.5, 2.5]
    steps = {str(line.get_label()): list(line.get_xdata()) for line in axes.lines}
    assert steps["study/a, training"] == list(range(1, 21))
    assert steps["study/a, validation"] == [20]


def test_tags_are_averaged_over_the_last_tenth(
    runs: list[Path], drawn: list[Figure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(monkeypatch, *runs, "tags=moe/max_load,train/loss", "output=new/curves.png")
    out = capsys.readouterr().out
    assert row_of(out, runs[0]) == ["18.5 (19)", "4.075 (4.1)"]  # of steps 18 and 19
    assert row_of(out, runs[1]) == ["37 (38)", "3.15 (3.2)"]
    assert Path("new/curves.png").exists()
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["moe/max_load", "train/loss"]
    assert list(drawn[0].axes[0].lines[1].get_ydata()) == [2.0 * step for step in range(20)]
    assert list(drawn[0].axes[0].lines[1].get_xdata()) == list(range(1, 21)), "steps as a person counts them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "RUN='nowhere' is not valid: expected the folder of a run, with event files or csv/ in it"),
        (["study/a", "tags=moe/max_laod"], "tags='moe/max_laod' is not valid: expected a scalar that one of"),
        (["study/a", "output=a.gpg"], "output='a.gpg' is not valid: expected a name that ends in one of .png,"),
        (["study/a", "output=file/a.png"], "output='file/a.png' is not valid: expected a folder that can be"),
    ],
)
def test_a_mistake_is_said(
    runs: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    Path("file").touch()
    with pytest.raises(SystemExit, match="2"):
        compare(monkeypatch, *arguments)
    err = capsys.readouterr().err
    assert err.startswith(f"Error: {message}")
    assert err.count("\n") == 1
    assert not list(Path().rglob("*.png"))


def test_a_run_that_keeps_its_curves_as_csv_is_one_too(
    tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logged as CSV only, and gone on with: the same curve as that of the run that TensorBoard has whole."""
    steady = "optim.schedule=constant"
    run(tmp_path, "csv", steady, "logger=csv", "trainer.max_steps=2")
    run(tmp_path, "csv", steady, "logger=csv", "trainer.max_steps=4", "ckpt_path=last")
    run(tmp_path, "whole", steady, "trainer.max_steps=4")
    monkeypatch.chdir(tmp_path)
    compare(monkeypatch, "csv", "whole", "tags=train/loss")
    ours, theirs = (dict(line.get_xydata().tolist()) for line in drawn[0].axes[0].lines)
    assert ours == pytest.approx(theirs)
    assert list(ours) == [1, 2, 3, 4]
    out = capsys.readouterr().out
    assert row_of(out, Path("csv")) == row_of(out, Path("whole")) == [f"{ours[4]:,.4g} ({ours[4]:,.4g})"]


def test_of_a_step_that_was_gone_over_again_the_later_value_counts(tmp_path: Path) -> None:
    """Ten beginnings, and TensorBoard for the last step: 2 comes before 10, and no step is there twice."""
    for number in range(11):
        folder = tmp_path / f"csv/version_{number}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(
            f"epoch,step,val/loss,train/loss\n0,{number},,{number}\n0,11,nan,{number}\n"
        )
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        writer.add_scalar("train/loss", 12.0, 12)
    steps, values = Run(tmp_path).curve("train/loss")
    assert (steps, values) == (list(range(13)), [*map(float, range(11)), 10.0, 12.0])
    assert Run(tmp_path).curve("val/loss")[0] == [11]


def test_a_run_is_compared_with_others_only(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("link").symlink_to(runs[0])
    with pytest.raises(SystemExit):
        compare(monkeypatch, *runs, "link")
    assert capsys.readouterr().err == f"Error: RUN='{runs[0]}' is not valid: expected a folder that is given once\n"
