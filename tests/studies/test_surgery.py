"""The weights of a tiny run under other placements, by the command."""

from pathlib import Path

import pytest

from core import cli
from core.errors import ConfigError
from core.untrusted import read_json
from studies import surgery
from studies.surgery import Taken, parse
from tests.support.runs import scalars
from tests.support.tool_runs import byte_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_run(tmp_path_factory.mktemp("source"), "experiment=dense_prenorm")


def test_each_placement_is_measured_before_and_after(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    output = tmp_path / "surgery"
    placements = "placements=prenorm,postnorm,mixln:post_fraction=0.0"
    surgery.main([str(run), placements, "steps=4", "lr=1e-2", f"output={output}"])
    kept, post, mixed = (
        read_json(output / f"{n}.json", Taken) for n in ("prenorm", "postnorm", "mixln_post_fraction_0.0")
    )
    validation = list(scalars(run, "val/loss").values())[-1]
    assert kept.before == pytest.approx(validation, rel=1e-5)
    assert kept.right_after == kept.before, "its own placement"
    assert (kept.new, kept.unused) == (0, 0)
    assert mixed.right_after == kept.before, "MixLN without PostNorm blocks is PreNorm"
    assert (mixed.new, mixed.unused) == (0, 0)
    assert post.right_after != kept.before
    assert post.unused == 1, "the final norm"
    assert all(taken.recovered != taken.right_after for taken in (kept, post, mixed))
    out = capsys.readouterr().out
    assert f"postnorm: {post.before:.3f} -> {post.right_after:.3f} -> {post.recovered:.3f}" in out
    rows = [line.split(" | ") for line in (output / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert sorted(row[0] for row in rows[1:]) == ["| mixln:post_fraction=0.0", "| postnorm", "| prenorm"]
    surgery.main([str(run), placements, "steps=4", "lr=1e-2", f"output={output}"])
    assert capsys.readouterr().out.count("has its record") == 3
    for other in ("steps=5", "lr=2e-2", "seed=2"):
        with pytest.raises(ConfigError, match=r"output='.*' is not valid: .* 4 steps at 0\.01, from a loss of"):
            surgery.main([str(run), placements, "steps=4", "lr=1e-2", f"output={output}", other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["placements=prenorn"], "model.placement='prenorn' is not valid"),
        (["placements=mixln:post_fraction"], "placements='mixln:post_fraction' is not valid"),
        (["steps=0"], "steps=0 is not valid"),
        (["lr=-1"], "lr=-1.0 is not valid"),
    ],
)
def test_mistakes_are_named(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("sys.argv", ["surgery", str(run), *arguments, f"output={tmp_path / 'surgery'}"])
    with pytest.raises(SystemExit) as leaving:
        cli.run(surgery.main)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_options_are_read_as_yaml() -> None:
    assert parse("mixln:gpas=true:post_fraction=0.5") == ("mixln", {"gpas": True, "post_fraction": 0.5})
    assert parse("my_file.MyNorm") == ("my_file.MyNorm", {})
