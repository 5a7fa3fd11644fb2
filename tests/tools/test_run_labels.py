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


def test_links_in_a_circle_are_names_too(tmp_path: Path) -> None:
    """What is not there is said by whoever opens it."""
    (tmp_path / "x").symlink_to(tmp_path / "y")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    assert len(set(labels([tmp_path / "x", tmp_path / "z/x"]))) == 2
