"""Shares a machine's GPUs out over the runs of studies: each waits for as many as it trains on, and has them alone.

A GPU in use is a locked file in a folder of the machine's, so that two studies do not take the same one. The training
process inherits the locks, as it may outlive a study that is killed. Each job of SLURM has a folder of its own: two
jobs on a machine may call different GPUs by the same number.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch
from omegaconf import DictConfig

from core.errors import require

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_SECONDS = 1.0


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, by number or UUID, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get(VISIBLE)
    if given is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [name for name in (part.strip() for part in given.split(",")) if name not in ("", "-1")]


def gpus_wanted(trainer: DictConfig, visible: Sequence[str]) -> int:
    """Return on how many GPUs of this machine a run trains; 0: on none.

    Args:
        trainer: of the run's configuration.
        visible: the GPUs that there are.

    Raises:
        ConfigError: more than there are.
    """
    if trainer.accelerator not in ("gpu", "cuda") and not (trainer.accelerator == "auto" and visible):
        return 0
    wanted = len(visible) if trainer.devices in ("auto", -1, "-1") else trainer.devices
    wanted = len(wanted) if not isinstance(wanted, int | str) else int(wanted)
    valid = f"at most {len(visible)}, the GPUs of this machine; trainer.accelerator=cpu trains without"
    require(1 <= wanted <= len(visible), "trainer.devices", trainer.devices, valid)
    return wanted


@contextmanager
def taken(number: int, visible: Sequence[str]) -> Iterator[dict[str, str]]:
    """Wait until so many GPUs are free, and give the variables that let a process see them and no others.

    Args:
        number: of GPUs; 0: no waiting, no variables.
        visible: those to choose from.
    """
    if number == 0:
        yield {}
        return
    job = os.environ.get("SLURM_JOB_ID", "")
    folder = Path(tempfile.gettempdir()) / f"spannorm-gpus-{os.getuid()}{job and f'-{job}'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as locks:
        found: dict[str, IO[str]] = {}
        with open(folder / "queue.lock", "w") as queue:  # one gathers at a time: two that have half each would wait on
            fcntl.flock(queue, fcntl.LOCK_EX)
            while len(found) < number:
                for name in visible:
                    path = folder / f"{name.replace('/', '-')}.lock"  # of older drivers: MIG-GPU-.../1/0
                    if len(found) < number and name not in found and (lock := _lock(path)):
                        found[name] = locks.enter_context(lock)
                if len(found) < number:
                    time.sleep(POLL_SECONDS)
        for lock in found.values():
            os.set_inheritable(lock.fileno(), True)
        yield {VISIBLE: ",".join(found)}


def _lock(path: Path) -> IO[str] | None:
    """Return the locked file, or None where another has it."""
    file = open(path, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
