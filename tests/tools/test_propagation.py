"""The command: what it prints, draws and refuses."""

from pathlib import Path

import pytest

from spannorm import PLACEMENTS
from tests.support.forked import python
from tools import propagation

ROOT = Path(__file__).parents[2]
SMALL = ["model.dim=32", "model.num_heads=2"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which the command sets, for good, in its process
    monkeypatch.setattr(propagation.torch, "set_num_threads", lambda count: None)
    propagation.cli.run(lambda: propagation.main(arguments))


def test_command_prints_a_table_and_draws_it(tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "tools.propagation", "model.placement=spannorm", "model.num_layers=40", *SMALL)
    assert (done.code, done.err) == (0, "")
    assert "…" not in done.out  # no column is cut
    lines = done.out.splitlines()
    rows = [line.split() for line in lines if line.strip() and line.split()[0].isdigit()]
    assert (rows[0][0], rows[-1][0], len(rows)) == ("1", "40", propagation.NUM_ROWS)
    assert {len(row) for row in rows} == {1 + len(propagation.COLUMNS) + len(propagation.PREDICTED)}
    assert rows[-1][1:3] == ["1", "1"]  # SpanNorm's variance, measured and predicted
    assert rows[-1][7] == rows[-1][8]  # gradients are predicted relative to the last block's
    assert any(line.startswith("Hidden gradient, first block over last: 1.") for line in lines)
    picture = tmp_path / lines[-1].removeprefix("Picture: ")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [picture]


def test_all_rows_and_no_theory_for_moe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(monkeypatch, "model=moe", "model.num_layers=18", *SMALL, "all_rows=true", f"output={tmp_path}/a.png")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, 19))
    assert {len(row) for row in rows} == {1 + len(propagation.COLUMNS)}
    assert "No theory for this model" in out
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.placement=spanorm", "did you mean spannorm?"),
        ("model.num_layer=2", "did you mean num_layers?"),
        ("model.dim=many", "an integer"),
        ("model=huge", "dense, moe"),
    ],
)
def test_mistakes_are_one_message(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, argument)
    err = capsys.readouterr().err
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_table_of_every_placement() -> None:
    rows = [
        line.strip("| ").split(" | ")
        for line in propagation.placements_table([*SMALL, "model.num_layers=2"]).split("\n")
    ]
    assert [row[0] for row in rows[2:]] == list(PLACEMENTS)
    assert {len(row) for row in rows[2:]} == {len(rows[0])}
    inits = {row[0]: row[1] for row in rows[2:]}
    assert (inits["spannorm"], inits["prenorm"]) == ("scale_init", "megatron")


def rows_of(markdown: str, num_cells: int) -> dict[tuple[str, str], list[str]]:
    """{(placement, init): the other cells} of every table row of that many cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:2] == "| "]
    return {(row[0], row[1]): row[2:] for row in rows if len(row) == num_cells and row[0] != "placement"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("init", [[], ["model.init=fan_in"]], ids=["default", "fan_in"])
def test_the_documented_table_is_what_the_command_prints(init: list[str]) -> None:
    documented = rows_of((ROOT / "docs/placements.md").read_text(), 9)
    printed = rows_of(propagation.placements_table(["model.num_layers=64", *init]), 9)
    compared = [key for key in printed if key in documented]
    assert len(compared) >= 17
    for key in compared:
        expected = [float(cell) for cell in documented[key]]
        assert [float(cell) for cell in printed[key]] == pytest.approx(expected, rel=0.15, nan_ok=True), key


@pytest.mark.slow
def test_a_documented_row_of_the_theory_is_what_the_command_prints() -> None:
    row = rows_of((ROOT / "docs/theory.md").read_text(), 6)["spannorm", "scale_init"]
    assert row[0] == "64"
    result = propagation.report(["model.placement=spannorm", "model.num_layers=64"])
    assert result.predictions is not None
    first, last = result.predictions[0], result.predictions[-1]
    measured = result.signals[-1]
    expected = [last.variance, measured.variance, first.skip_gradient, first.hidden_gradient]
    expected += [propagation.gradient_ratio(result), last.cosine, measured.cosine]
    assert [float(cell) for cell in ", ".join(row[1:]).split(", ")] == pytest.approx(expected, rel=0.1, abs=5e-4)


def test_compiling_and_checkpointing_change_nothing() -> None:
    plain = propagation.report([*SMALL, "model.num_layers=2"])
    other = propagation.report(
        [*SMALL, "model.num_layers=2", "model.compile=true", "model.activation_checkpointing=true"]
    )
    assert plain.signals == other.signals
