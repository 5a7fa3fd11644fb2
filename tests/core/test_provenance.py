"""Where a result comes from, against git and the machine itself."""

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from core import provenance as module
from core.provenance import FIELDS, OF_THE_USER, origin, provenance
from tests.support.runs import events, run
from tools.run_facts import facts


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
    module._checkout.cache_clear()
    found = provenance("cpu", ["one", "two"])
    assert (found["commit"], found["dirty"]) == (git(tmp_path, "rev-parse", "HEAD").strip(), False)
    (tmp_path / "file").write_text("b")
    assert provenance("cpu")["dirty"] is False, "the code that was imported"
    module._checkout.cache_clear()
    assert provenance("cpu")["dirty"] is True
    module._checkout.cache_clear()
    assert list(found) == list(FIELDS)
    assert (found["torch"], found["threads"], found["device"]) == (torch.__version__, torch.get_num_threads(), "cpu")
    assert found["corpus"] == "one two"


def test_the_command_and_the_host_are_the_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "+callbacks=[a, b]", "seed=1"])
    found = origin("cpu")
    assert list(found) == [*FIELDS, *OF_THE_USER]
    assert shlex.split(found["command"])[1:] == ["train.py", "+callbacks=[a, b]", "seed=1"]
    assert found["host"] == socket.gethostname()
    assert not set(OF_THE_USER) & set(provenance("cpu"))


def test_a_run_notes_it_before_it_trains_and_once_more_when_it_is_resumed(tmp_path: Path) -> None:
    folder = run(tmp_path, "run")
    noted = json.loads((folder / "provenance.json").read_text())
    assert shlex.split(noted["command"])[-1] == "run_dir=run"
    summary = json.loads((folder / "summary.json").read_text())["provenance"]
    assert {name: noted[name] for name in FIELDS} == summary
    settings = HParamsPluginData.FromString(
        events(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    assert settings["provenance/torch"].string_value == torch.__version__
    assert settings["provenance/host"].string_value == noted["host"]
    run(tmp_path, "run", "ckpt_path=last", "trainer.max_steps=3")
    assert json.loads((folder / "provenance.json").read_text()) == noted, "its beginning stays"
    (resumed,) = folder.glob("provenance-resumed-*.json")
    assert "ckpt_path=last" in facts(folder)["command"]
    assert facts(folder)["host"] == noted["host"]
    resumed.write_text(json.dumps({"command": 5, "host": "h" * 2000, "torch": "other"}))
    assert "command" in facts(folder)
    assert "host" not in facts(folder), "of more characters than a name has"
    assert facts(folder)["torch"] == "other"
    resumed.with_name("provenance-resumed-2999-01-01_00-00-00.json").write_text(json.dumps({"torch": "newest"}))
    assert facts(folder)["torch"] == "newest", "of the process that trained it last"
