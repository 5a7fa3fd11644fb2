"""Batches of a data-loader process lie in memory that it shares with the main one."""

from torch import Tensor
from torch.utils.data import get_worker_info


def shared(tensor: Tensor) -> Tensor:
    """The tensor; in a data-loader process, moved to shared memory.

    torch would move it there from the thread that hands batches on. Where /dev/shm is full, that prints a traceback and
    drops the batch, and the main process waits for it without end.

    Raises:
        RuntimeError: there is no room; core.interruption says it in words.
    """
    return tensor if get_worker_info() is None else tensor.share_memory_()
