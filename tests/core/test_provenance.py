"""Where a result comes from, against git and the machine itself."""

import subprocess
from pathlib import Path

import pytest
import torch

from core import provenance as module
from core.provenance import FIELDS, provenance


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", folder, *settings, *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_the_commit_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    found = provenance("cpu")
    assert (found["commit"], found["dirty"]) == (None, None), "no checkout"
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "Begin")
    found = provenance("cpu", ["one", "two"])
    assert (found["commit"], found["dirty"]) == (git(tmp_path, "rev-parse", "HEAD").strip(), False)
    (tmp_path / "file").write_text("b")
    assert provenance("cpu")["dirty"] is True
    assert list(found) == list(FIELDS)
    assert (found["torch"], found["threads"], found["device"]) == (torch.__version__, torch.get_num_threads(), "cpu")
    assert found["corpus"] == "one two"
