"""Colour on a terminal only, and none under NO_COLOR; overrides are completed by the shell."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT, TRAIN, tiny_job, train

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38)[;\d]*m")


def on_a_terminal(cwd: Path, *command: str, **environment: str) -> str:
    """What the command shows on a terminal of its own."""
    leader, follower = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    settings = {**plain, "TERM": "xterm-256color", "COLUMNS": "160", "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(command, cwd=cwd, stdin=follower, stdout=follower, stderr=follower, env=settings)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a run that is done, as far as its files say."""
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    (run / "summary.json").write_text('{"steps": 5, "val_loss": 1.5}')
    return tmp_path


def test_runs_are_coloured_on_a_terminal_only(folder: Path) -> None:
    command = (sys.executable, "-m", "tools.runs")
    assert COLOUR.search(on_a_terminal(folder, *command))
    plain = on_a_terminal(folder, *command, NO_COLOR="1")
    assert not COLOUR.search(plain)
    assert "1.5000" in plain
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    piped = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    assert "1.5000" in piped
    assert "\x1b" not in piped


def test_listing_does_not_wait_for_torch() -> None:
    code = "import sys, tools.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=200).returncode == 0


def test_training_that_is_not_on_a_terminal_is_plain_lines(tmp_path: Path) -> None:
    finished = train(tmp_path, *tiny_job("run_dir=run"))
    assert finished.code == 0, finished.err
    assert "step 2/2" in finished.out
    assert not set("\x1b\r") & set(finished.out + finished.err)


@pytest.mark.slow
@pytest.mark.parametrize("no_color", [False, True])
def test_training_is_a_coloured_bar_on_a_terminal(tmp_path: Path, no_color: bool) -> None:
    environment = {"NO_COLOR": "1"} if no_color else {}
    shown = on_a_terminal(tmp_path, sys.executable, str(TRAIN), *tiny_job("run_dir=run"), **environment)
    assert "step 2/2" in shown
    assert bool(COLOUR.search(shown)) is not no_color
    assert len(shown.splitlines()) < 60, "no flood"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("experiment=moe_spannorm", ["experiment=moe_spannorm", "experiment=moe_spannorm_gpu"]),
        ("optim.warm", ["optim.warmup_steps="]),
        ("logger=", ["logger=comet", "logger=csv", "logger=mlflow", "logger=tensorboard", "logger=wandb"]),
        ("no.such", []),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash completes")
def test_bash_completes_overrides(typed: str, offered: list[str]) -> None:
    install = subprocess.run(
        [sys.executable, str(TRAIN), "--shell-completion", "install=bash"], capture_output=True, text=True, check=True
    ).stdout
    script = f"""{install}
COMP_LINE="python train.py {typed}"; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=($COMP_LINE); COMP_CWORD=2
hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    completed = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert sorted(completed.stdout.split()) == offered, completed.stderr
