"""Groups of gloo processes on one machine, each kept for many cases: importing torch costs more than they do."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Forked from a process that has imported these already.
multiprocessing.set_forkserver_preload(["lightning", "tests.distributed.runs", "tests.distributed.processes"])


def together(num_processes: int, folder: Path, function: Callable[..., Any], cases: list[Any]) -> list[list[Any]]:
    """What `function(folder, case)` returns in each process, by rank and case; they meet in a group of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (num_processes, folder, port, function, cases)
    mp.start_processes(_work, arguments, nprocs=num_processes, start_method="forkserver")
    return [torch.load(_results(folder, num_processes, rank)) for rank in range(num_processes)]


def _work(rank: int, size: int, folder: Path, port: int, function: Callable[..., Any], cases: list[Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.save([function(folder, case) for case in cases], _results(folder, size, rank))
    dist.destroy_process_group()


def _results(folder: Path, size: int, rank: int) -> Path:
    return folder / f"results-{rank}-of-{size}"
