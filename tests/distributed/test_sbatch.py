"""docs/scaling.md's file for sbatch, with stand-ins for SLURM's commands."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import ROOT
from tools.plan import compose_config

FILE = re.search(r"```text\n(#!/bin/bash\n.*?)```", (ROOT / "docs/scaling.md").read_text(), re.DOTALL)
assert FILE is not None
SCRIPT = FILE[1]


def submit(folder: Path) -> tuple[int, list[str]]:
    """Its exit code, and what it has srun start."""
    (folder / "srun").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/started\nexit 138\n')
    (folder / "srun").chmod(0o755)
    (folder / "train.sbatch").write_text(SCRIPT)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    code = subprocess.run(["bash", "train.sbatch"], cwd=folder, env=environment, check=False).returncode
    return code, (folder / "started").read_text().splitlines()


def test_it_starts_a_run_and_then_goes_on_with_it(tmp_path: Path) -> None:
    code, first = submit(tmp_path)
    assert code == 138, "srun's: SLURM sees that the job has not come to its end"
    assert first[:3] == ["--kill-on-bad-exit=1", "python", "train.py"]
    assert "run_dir=runs/big" in first
    (tmp_path / "runs/big").mkdir(parents=True)
    (tmp_path / "runs/big/config.yaml").touch()
    assert submit(tmp_path) == (138, [*first, "ckpt_path=last"])


def test_its_processes_are_those_that_the_trainer_expects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(
        option.removeprefix("--").partition("=")[::2]
        for line in SCRIPT.splitlines()
        if line.startswith("#SBATCH")
        for option in shlex.split(line)[1:]
    )
    assert options["gpus-per-node"] == options["ntasks-per-node"], "a process a device"
    assert options["signal"].startswith("SIGUSR1@"), "not with B: to the processes and not to this script"
    assert {"requeue", "open-mode"} <= options.keys()
    monkeypatch.setenv("SLURM_NNODES", options["nodes"])
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", options["ntasks-per-node"])
    _, started = submit(tmp_path)
    trainer = compose_config(started[3:]).trainer
    assert (str(trainer.num_nodes), str(trainer.devices)) == (options["nodes"], options["ntasks-per-node"])
