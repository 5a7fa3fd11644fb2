"""Groups of gloo processes on one machine, each kept for many cases: importing torch costs more than they do."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tests.support.forked import server
from tests.support.runs import Finished, train

SECONDS = 200
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""Of a Trainer in one of them."""


def together(num_processes: int, folder: Path, function: Callable[..., Any], cases: list[Any]) -> list[list[Any]]:
    """What `function(folder, case)` returns in each process, by rank and case; they meet in a group of their own.

    A process that is killed has returned nothing.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = server()
    group = [
        context.Process(target=_work, args=(rank, num_processes, folder, port, function, cases))
        for rank in range(num_processes)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(SECONDS)
    hanging = [process for process in group if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "processes wait for each other"
    results = [_results(folder, num_processes, rank) for rank in range(num_processes)]
    return [torch.load(path, weights_only=False) if path.exists() else [] for path in results]


def _work(rank: int, size: int, folder: Path, port: int, function: Callable[..., Any], cases: list[Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    rank_zero_only.rank = rank  # as Lightning reads it from the environment when it is imported
    torch.save([function(folder, case) for case in cases], _results(folder, size, rank))
    dist.destroy_process_group()


def _results(folder: Path, size: int, rank: int) -> Path:
    return folder / f"results-{rank}-of-{size}"


def command_line(folder: Path, arguments: list[str]) -> Finished:
    """`python train.py ARGUMENTS` in a process of a group."""
    return train(folder, *arguments)


def under_torchrun(folder: Path, arguments: list[str]) -> Finished:
    """The same in one of two processes with torchrun's variables."""
    rank = os.environ["LOCAL_RANK"]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    with mock.patch.dict(os.environ, {"RANK": rank, **group, "TORCHELASTIC_RUN_ID": "7"}):
        del os.environ["NODE_RANK"]
        return command_line(folder, arguments)


def under_slurm(folder: Path, arguments: list[str]) -> tuple[Finished, bool]:
    """The same in one of two processes with srun's variables; the commands in the folder are found first.

    Returns:
        How it ended, and whether the job had been requeued by then.
    """
    rank = os.environ["LOCAL_RANK"]
    own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "big", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    with mock.patch.dict(os.environ, {**own, **job, "PATH": f"{folder}:{os.environ['PATH']}"}):
        del os.environ["LOCAL_RANK"], os.environ["NODE_RANK"]
        finished = command_line(folder, arguments)
    return finished, (folder / "requeued").exists()
