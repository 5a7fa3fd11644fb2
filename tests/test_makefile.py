"""What `make train` runs, with and without a GPU, and `make bench`."""

import os
import shutil
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
    make = ["make", "-n", "--no-print-directory", "train", "ARGS=seed=1"]
    said = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert " ".join(said.splitlines()[-1].split()[1:]) == command
    assert ('test -z "trainer=auto"' in said) == ("trainer=auto" in command)
    assert "echo \"A GPU is here: 'make megablocks' builds MegaBlocks for it" in said


def test_another_torch_has_an_environment_of_its_own() -> None:
    made = ["make", "-n", "test", "TORCH=2.14.1"]
    said = subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv-torch-2.14.1/bin/python -m pip install" in said
    assert " torch==2.14.1" in said
    assert ".venv-torch-2.14.1/bin/python -m pytest" in said
    assert ".venv/bin" not in said


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], "compare costs generation evaluation start busy small"),
        (["PART=start busy", "ARGS=rounds=3"], "start busy"),
    ],
)
def test_each_benchmark_can_be_asked_for_and_gets_its_fields(arguments: list[str], parts: str, tmp_path: Path) -> None:
    """Run with environments in which everything is there and python only says what it was asked."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in (".venv", ".venv-bench"):
        python = tmp_path / folder / "bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\necho {folder} $@ >> said\n")
        python.chmod(0o755)
    for made in (".venv/.made-3.11.0", ".venv/.test-3.11.0", ".venv/.train-3.11.0", ".venv-bench/.made-3.11.0"):
        (tmp_path / made).touch()
    for requirements in ("requirements.txt", "requirements-bench.txt"):
        (tmp_path / requirements).touch()
        os.utime(tmp_path / requirements, (0, 0))
    subprocess.run(["make", "bench", *arguments], cwd=tmp_path, check=True, capture_output=True)
    fields = [argument.removeprefix("ARGS=") for argument in arguments if argument.startswith("ARGS=")]
    expected = [
        " ".join([".venv-bench" if part in ("compare", "costs") else ".venv", "-m", f"benchmarks.{part}", *fields])
        for part in parts.split()
    ]
    assert (tmp_path / "said").read_text().splitlines() == expected
    assert all((ROOT / "benchmarks" / f"{part}.py").is_file() for part in parts.split())
