"""tools.run_labels: no two runs have the same name."""

from pathlib import Path

from tools.run_labels import labels


def test_runs_have_names_of_their_own(tmp_path: Path) -> None:
    """As many parts of their paths as that takes, the same number of each."""
    x = [tmp_path / name for name in ("a/x/seed0", "b/x/seed0", "b/x/seed1")]
    assert labels(x) == ["a/x/seed0", "b/x/seed0", "b/x/seed1"]
    assert labels(x[1:]) == ["x/seed0", "x/seed1"]
    assert labels([tmp_path / "a/x", tmp_path / "b/y"]) == ["a", "b"]
    assert labels([Path("/x/seed0"), Path("/a/x/seed0")]) == ["x/seed0", "a/x/seed0"]
