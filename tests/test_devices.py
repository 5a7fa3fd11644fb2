"""A GPU that is there, played by a plugin: tests do not see it, those for a GPU do, and warnings do not fail them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from tests.support.devices import without_gpus
from tests.support.runs import ROOT

PLUGIN = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
"""
TESTS = """
import os, warnings
import pytest, torch
from lightning.pytorch.accelerators import CUDAAccelerator

@pytest.fixture(scope="session")
def shared():
    return torch.cuda.is_available()

def test_hidden(shared):
    assert not shared and not torch.cuda.is_available() and not CUDAAccelerator.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

@pytest.mark.gpu
def test_seen():
    assert torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    warnings.warn("of a library")

def test_warned():
    warnings.warn("of a library")
"""


@pytest.mark.slow
def test_which_device_a_test_sees(tmp_path: Path) -> None:
    (tmp_path / "a_gpu.py").write_text(PLUGIN)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={ROOT}", f"--config-file={ROOT}/pyproject.toml"]
    plugins = ["-p", "a_gpu", "-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([*command, *plugins, str(tmp_path)], capture_output=True, text=True, env=path, cwd=tmp_path)
    assert re.findall(r"^FAILED \S+::(\w+) - (\w+)", ended.stdout, re.MULTILINE) == [("test_warned", "UserWarning")]
    assert "1 failed, 2 passed" in ended.stdout, ended.stdout + ended.stderr


def test_what_hides_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with without_gpus():
        assert not CUDAAccelerator.is_available()
        assert (torch.cuda.is_available(), torch.cuda.device_count()) == (False, 0)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.device_count() == 8
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
