"""MegaBlocks is installed for a GPU that is not here: what keeps it from being built is said in a line, before pip."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension

from core.errors import UserError
from tools import megablocks

HEADER = """
    CUDA_CALL(cub::DeviceScan::ExclusiveSum(d_temp_storage, num_items,
\t\t\t\t\t    stream,
\t\t\t\t\t    debug_synchronous));
    CUDA_CALL(cub::DeviceScan::InclusiveSum(d_temp_storage, num_items,
\t\t\t\t\t    stream,
\t\t\t\t\t    debug_synchronous));
"""
SETUP = """
import torch
from torch.utils.cpp_extension import CUDA_HOME
if 'cu' in torch.__version__ and CUDA_HOME is not None:
    torch.cuda.get_device_capability()
elif CUDA_HOME is None:
    pass
"""
CUMSUM = "csrc/cumsum.h"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A CUDA build of torch with its nvcc and an H200; pip notes what it is asked for."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(nvcc.parents[1]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(megablocks, "installed", lambda names: False)
    calls: list[tuple[list[str], dict[str, str]]] = []

    def pip(arguments: list[str], variables: dict[str, str]) -> None:
        calls.append((arguments, variables))
        if arguments[0] == "download":
            wanted = Path(arguments[-1])
            name = wanted.stem.replace("-", "_")
            sources = wanted.parent / f"{name}-{megablocks.versions()[wanted.stem]}"
            (sources / "csrc").mkdir(parents=True)
            (sources / CUMSUM).write_text(HEADER)
            (sources / "setup.py").write_text(SETUP)
            subprocess.run(["tar", "czf", f"{sources}.tar.gz", "-C", str(wanted.parent), sources.name], check=True)
        else:
            installed.append({path: (Path(arguments[-1]) / path).read_text() for path in (CUMSUM, "setup.py")})

    installed: list[dict[str, str]] = []
    monkeypatch.setattr(megablocks, "_pip", pip)
    monkeypatch.setattr(megablocks, "IMPORTED", "pass")
    return SimpleNamespace(nvcc=nvcc, calls=calls, installed=installed)


def test_it_is_fetched_by_its_checksum_mended_and_built_for_the_gpu(
    machine: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    megablocks.main([])
    downloads = [arguments for arguments, _ in machine.calls if arguments[0] == "download"]
    assert [Path(arguments[-1]).stem for arguments in downloads] == ["megablocks", "stanford-stk", "grouped_gemm"]
    assert all({"--require-hashes", "--no-deps", "--no-binary"} <= set(arguments) for arguments in downloads)
    assert all("--hash=sha256:" in line for line in megablocks.pins().values())
    builds = [variables for arguments, variables in machine.calls if arguments[0] == "install"]
    assert [variables["TORCH_CUDA_ARCH_LIST"] for variables in builds] == ["9.0"] * 3
    mended = machine.installed[0]
    assert "debug_synchronous" not in mended[CUMSUM]
    assert mended[CUMSUM].count("stream));") == 2
    assert mended["setup.py"] == SETUP
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("megablocks 0.10.0, stanford-stk 0.7.1, grouped_gemm 0.3.0: built for 9.0 in ")


def test_the_python_files_alone_are_compiled_nowhere(
    machine: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a CUDA build of torch and a toolkit, and without a driver."""
    megablocks.main(["compiled=false"])
    assert "Python files installed, nothing compiled" in capsys.readouterr().out
    assert len(machine.installed) == 2, "grouped_gemm has nothing else"
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: pytest.fail("no driver"))
    exec(machine.installed[0]["setup.py"])
    with pytest.raises(pytest.fail.Exception, match="no driver"):
        exec(SETUP)


def no_nvcc(machine: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    machine.nvcc.unlink()


def old_nvcc(machine: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    machine.nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")


def no_gpu(machine: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)


def old_gpu(machine: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))


def no_cuda(machine: SimpleNamespace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.version, "cuda", None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_cuda, "needs a CUDA build of torch, and torch .* is none"),
        (no_nvcc, "needs nvcc of CUDA 13.0, and .*/bin/nvcc is not there; CUDA_HOME says where it is"),
        (old_nvcc, "needs nvcc of CUDA 13.0, torch's, and .*/bin/nvcc is of 12.8"),
        (no_gpu, "no GPU is here; TORCH_CUDA_ARCH_LIST=9.0 names it"),
        (old_gpu, "TORCH_CUDA_ARCH_LIST='7.0' is not valid: expected a list of compute capabilities from 8.0 on"),
    ],
)
def test_what_is_lacking_is_said_before_anything_is_fetched(
    change: Any, reason: str, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(machine, monkeypatch)
    with pytest.raises(UserError, match=reason):
        megablocks.main([])
    assert not machine.calls


def test_other_sources_are_not_mended(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / CUMSUM).write_text("stream")
    with pytest.raises(UserError, match=r"cumsum\.h of MegaBlocks is not the one .* 0 places, not 2"):
        megablocks.mend(tmp_path, compiled=True)


def test_what_is_here_stays(capsys: pytest.CaptureFixture[str]) -> None:
    megablocks.main(["compiled=false"])
    assert capsys.readouterr().out == "megablocks 0.10.0, stanford-stk 0.7.1: here already\n"


def test_pip_says_in_a_line_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="pip download failed: it did not say why"):
        megablocks._pip(["download"], {})
