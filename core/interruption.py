"""Decides what becomes of a run that somebody, Lightning, or the loss of a process stops early."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from core.compat import (
    is_restoring,
    lacks_compiler,
    lacks_metric,
    lacks_shared_memory,
    lost_a_loader_process,
    lost_a_peer,
    stop_watching_launched,
)
from core.console import quiet_writers
from core.errors import ConfigError, UserError, one_line
from core.file_errors import DISK, about_a_file
from core.memory import explain_lack
from core.printable import printable
from core.rank_errors import leave_together
from core.run_control import TrainingInterrupted
from core.run_folder import LAST, is_main_process, resume_command
from core.untrusted import is_within

PEER_LOST = 4
SERVICES = {
    "wandb": "`wandb login` once, or logger.wandb.offline=true keeps everything here",
    "mlflow": "logger.mlflow.tracking_uri says where it is kept",
}
"""Packages of loggers that ask elsewhere, and what helps."""


@contextmanager
def report_failures(trainer: L.Trainer, run_dir: Path) -> Iterator[None]:
    """Let an interruption of the training inside end in words, the way to go on, and exit code 128 + signal.

    Raises:
        UserError: what Lightning finds wrong with the configuration only now, as a metric that nobody logs; a folder
            that is full, or gone; data-loader processes that the machine has killed, or given no shared memory.
    """
    try:
        with _in_words(trainer, run_dir):
            yield
    except BaseException:
        # This process is leaving with a code of its own, which it would not have if Lightning killed it.
        stop_watching_launched()
        raise


@contextmanager
def _in_words(trainer: L.Trainer, run_dir: Path) -> Iterator[None]:
    try:
        with quiet_writers():
            yield
    except TrainingInterrupted as interruption:
        _leave(run_dir, interruption)
    except SIGTERMException:
        # Lightning's answer to a SIGTERM that comes before the first step, amid its check of the validation.
        _print(f"Interrupted at once; {_way_on(run_dir)}")
        sys.exit(128 + signal.SIGTERM)
    except SystemExit:
        # Lightning's answer to a Ctrl-C that no callback took: before the first step, or the second one.
        if not trainer.interrupted:
            raise
        # Nobody is waited for: processes that Lightning launched are killed by now.
        _print(f"Interrupted at once; {_way_on(run_dir)}")
        sys.exit(128 + signal.SIGINT)
    except MisconfigurationException as error:
        raise UserError(one_line(error)) from error
    except MemoryError as error:
        raise explain_lack(error) or error from error
    except OSError as error:
        if lacks_shared_memory(error):
            raise _no_shared_memory(trainer) from error
        if run_dir.is_dir() and (error.errno not in DISK or _is_elsewhere(error, run_dir)):
            raise about_a_file(error) or error from error
        reason = error.strerror if run_dir.is_dir() else "it is gone"
        raise UserError(f"{run_dir} cannot be written to any more: {reason}. Checkpoints in it are whole") from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError) or (other := _not_of_this_run(trainer, error)) is None:
            raise
        raise other from error
    except Exception as error:
        if (said := _said_by_a_logger(error)) is not None:
            raise UserError(said) from error
        if lacks_compiler(error):
            first = str(error).partition("\n")[0]
            valid = f"false, or a C++ compiler and Python's headers (g++, python3-dev): {first}"
            raise ConfigError("model.compile", True, valid) from error
        if not isinstance(error, RuntimeError):
            raise
        if lacks_metric(error):
            raise UserError(one_line(error)) from error
        if (other := _not_of_this_run(trainer, error)) is not None:
            raise other from error
        if lost_a_loader_process(error) or lacks_shared_memory(error):
            raise _no_shared_memory(trainer) from error
        if (lack := explain_lack(error)) is not None:
            raise lack from error
        if not lost_a_peer(error):
            raise
        # By whoever is left: it may be the first process that is gone, which alone knows the folder for sure.
        message = f"Process {trainer.global_rank} stops: another one is gone, or did not answer ({one_line(error)})"
        way_on = _way_on(run_dir) if (run_dir / LAST).exists() else "ckpt_path=last goes on from there"
        print(f"\n{message}. What was saved stays; {way_on}", file=sys.stderr, flush=True)
        sys.exit(PEER_LOST)


def _not_of_this_run(trainer: L.Trainer, error: Exception) -> ConfigError | None:
    """Return what to say where a callback, a loop or an optimizer could not take its state from the checkpoint."""
    frames = traceback.extract_tb(error.__traceback__)
    # torch takes an optimizer's state as it is; what it does not fit is found in the first step.
    # The last frame alone counts: Lightning computes the loss in a closure within the optimizer's step.
    stepping = trainer.ckpt_path is not None and "/torch/optim/" in frames[-1].filename
    lacks = isinstance(error, RuntimeError) and (explain_lack(error) is not None or lost_a_peer(error))
    if lacks or not (stepping or is_restoring(error)):
        return None
    valid = f"a checkpoint of this run; its states cannot be restored ({type(error).__name__}: {one_line(error)})"
    return ConfigError("ckpt_path", str(trainer.ckpt_path), valid)


def _said_by_a_logger(error: Exception) -> str | None:
    """Return in a line why a logger's service cannot be had, as Weights & Biases without a login; None: it is not that.

    Their errors are known by where they are defined: the packages need not be installed.
    """
    service = type(error).__module__.partition(".")[0]
    if service not in SERVICES:
        return None
    return f"logger={service} cannot be had ({one_line(error)}); {SERVICES[service]}"


def _no_shared_memory(trainer: L.Trainer) -> ConfigError:
    valid = "0, or more shared memory (/dev/shm) for data-loader processes: it was full, or one was killed"
    return ConfigError("data.num_workers", trainer.datamodule.num_workers, valid)  # type: ignore[attr-defined]


def _is_elsewhere(error: OSError, run_dir: Path) -> bool:
    """Return whether it names a file that is not in the run's folder."""
    name = error.filename
    return isinstance(name, str | bytes) and not is_within(run_dir, Path(os.fsdecode(name)))


def _leave(run_dir: Path, interruption: TrainingInterrupted) -> NoReturn:
    if not interruption.saved:
        _print(f"Interrupted: {interruption}. Not saved, as callbacks.last_checkpoint is off.")
    elif (run_dir / LAST).exists():
        _print(f"Interrupted: {interruption}. Saved; {_way_on(run_dir)}")
    else:  # by a callback of the user's own, which alone knows where
        _print(f"Interrupted: {interruption}. Saved.")
    in_slurm = interruption.signum == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ
    if is_main_process() and in_slurm and interruption.saved:  # or the job would do the same steps for ever
        _requeue()
    leave_together()
    sys.exit(interruption.code)


def _print(message: str) -> None:
    """Print a message below a progress bar, once for all processes."""
    if is_main_process():
        print(f"\n{message}", flush=True)


def _way_on(run_dir: Path) -> str:
    if (run_dir / LAST).exists():
        return f"go on with\n  {printable(resume_command(run_dir), limit=None)}"
    return "there was nothing to save."


def _requeue() -> None:
    """Requeue the SLURM job; Lightning's own answer would save a second file in the middle of a step."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:  # a container, for one, may not have the command
        print(f"SLURM job {job} is not requeued: {error}")
    else:
        print(f"Requeued SLURM job {job}.")
