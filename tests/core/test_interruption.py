"""What happens on a cluster to a run that a signal has ended."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from core.compat import RESTORING
from core.errors import ConfigError
from core.interruption import PEER_LOST, report_failures
from core.run_control import TrainingInterrupted
from tests.support.runs import TRAIN, python, tiny_job

TRAINER: Any = SimpleNamespace(ckpt_path=None, global_rank=0, interrupted=False)


def scontrol(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for SLURM's command that notes what it is asked."""
    command, asked = folder / "scontrol", folder / "asked"
    command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit {code}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return asked


@pytest.mark.parametrize(
    ("job", "name"),
    [
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "1"}, "8_1"),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_sigusr1_requeues_the_slurm_job(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    job: dict[str, str],
    name: str,
    code: int,
) -> None:
    asked = scontrol(tmp_path, code, monkeypatch)
    for variable, value in job.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as leaving, report_failures(TRAINER, tmp_path):
        raise TrainingInterrupted(signal.SIGUSR1, 3)
    assert leaving.value.code == 128 + signal.SIGUSR1
    assert asked.read_text() == f"requeue {name}\n"
    out = capfd.readouterr().out
    assert (f"Requeued SLURM job {name}." in out) is (code == 0)
    assert (f"SLURM job {name} is not requeued: " in out) is (code == 1)


def test_without_scontrol_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit), report_failures(TRAINER, tmp_path):
        raise TrainingInterrupted(signal.SIGUSR1, 3)
    assert "SLURM job 7 is not requeued: [Errno 2]" in capsys.readouterr().out


@pytest.mark.parametrize(("signum", "job"), [(signal.SIGTERM, "7"), (signal.SIGUSR1, "")])
def test_nothing_else_requeues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, job: str) -> None:
    asked = scontrol(tmp_path, 0, monkeypatch)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    with pytest.raises(SystemExit), report_failures(TRAINER, tmp_path):
        raise TrainingInterrupted(signum, 3)
    assert not asked.exists()


@pytest.mark.parametrize("error", [dist.DistBackendError("nccl"), RuntimeError("[/gloo/pair.cc:1] Connection closed")])
def test_the_loss_of_a_process_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: RuntimeError
) -> None:
    with pytest.raises(SystemExit) as leaving, report_failures(TRAINER, tmp_path):
        raise error
    assert leaving.value.code == PEER_LOST
    assert "Process 0 stops: another one is gone" in capsys.readouterr().err


def test_another_error_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape"), report_failures(TRAINER, tmp_path):
        raise RuntimeError("shape mismatch")


def test_states_that_cannot_be_restored_end_in_one_line(tmp_path: Path) -> None:
    """The names are those of Lightning's functions, in which a state that is not ours raises whatever it does."""
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

    assert all(hasattr(_CheckpointConnector, name) for name in RESTORING)

    def restore_callbacks(error: Exception) -> None:
        raise error

    trainer: Any = SimpleNamespace(ckpt_path="x.ckpt", interrupted=False, global_rank=0)
    for error in (KeyError("parts"), TypeError("x"), AttributeError("x"), ValueError("x"), RuntimeError("x")):
        refused = rf"ckpt_path='x.ckpt'.*{type(error).__name__}"
        with pytest.raises(ConfigError, match=refused), report_failures(trainer, tmp_path):
            restore_callbacks(error)
        with pytest.raises(type(error)) as raised, report_failures(trainer, tmp_path):
            raise error.with_traceback(None)
        assert raised.value is error, "a fault of the project keeps its traceback"


@pytest.mark.parametrize(
    "said",
    [
        "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
        "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.",
        "CalledProcessError: Command '['/usr/bin/gcc', '/tmp/x/main.c', '-lcuda']' returned non-zero exit status 1.",
    ],
)
def test_a_compiler_that_is_not_there_is_said(tmp_path: Path, said: str) -> None:
    """As torch and Triton word it."""
    valid = r"^model\.compile=True is not valid: expected false, or a C\+\+ compiler"
    with pytest.raises(ConfigError, match=valid) as caught, report_failures(TRAINER, tmp_path):
        raise RuntimeError(f"{said}\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")
    assert str(caught.value).endswith(said)


@pytest.mark.slow
def test_a_compiler_that_is_really_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    finished = python(tmp_path, str(TRAIN), *tiny_job("model.compile=true", "run_dir=run"))
    assert finished.code == 2
    assert "Error: model.compile=True is not valid: expected false, or a C++ compiler" in finished.err
    assert "Traceback" not in finished.err
