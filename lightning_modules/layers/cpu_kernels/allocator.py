"""Keeps the memory that a training step frees on a CPU for the next one, which needs the same again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""


def keep_freed_memory() -> bool:
    """Have glibc neither hand memory back nor map large blocks one by one: docs/decisions.md. Elsewhere nothing.

    Returns:
        Whether the C library could be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))
