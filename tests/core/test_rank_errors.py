"""Processes that leave together: each waits for the others, but not for ever."""

import os
import time
from pathlib import Path

import torch.distributed as dist

from core.rank_errors import leave_together
from tests.support.processes import together

SECONDS = 2.0


def leave(folder: Path, comes: bool) -> float:
    """Seconds that it takes; the second process comes late, or is there and never does."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    began = time.monotonic()
    if dist.get_rank() == 0:
        leave_together(SECONDS)
        (folder / f"left-{comes}").touch()
    elif comes:
        time.sleep(SECONDS / 4)
        leave_together(SECONDS)
    else:
        while not (folder / f"left-{comes}").exists():
            time.sleep(0.05)
    return time.monotonic() - began


def test_who_waits_for_the_others_waits_no_longer_than_the_limit(tmp_path: Path) -> None:
    (late, never), _ = together(2, tmp_path, leave, [True, False])
    assert late < SECONDS <= never < 10 * SECONDS
