"""What `make train` runs, with and without a GPU."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import ROOT

PLAIN = "train.py experiment=moe_spannorm"


@pytest.mark.parametrize(
    ("gpus", "command"),
    [
        ("echo 'GPU 0: NVIDIA H200'", f"{PLAIN} trainer=auto seed=1"),
        ("echo NVIDIA-SMI has failed; exit 9", f"{PLAIN} seed=1"),
    ],
)
def test_the_main_job_takes_the_gpu_that_is_seen(gpus: str, command: str, tmp_path: Path) -> None:
    """In bf16 and compiled, as MegaBlocks wants it, which is named there."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{gpus}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    make = ["make", "-n", "train", "ARGS=seed=1"]
    said = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert " ".join(said.splitlines()[-1].split()[1:]) == command
    assert ('test -z "trainer=auto"' in said) == ("trainer=auto" in command)
