"""Lets processes do together what is beside training: find that one is lost, fail, and leave."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from core.compat import lost_a_peer
from core.errors import UserError


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise in all processes what goes wrong in one, which the others would wait for in vain; all must come here.

    Raises:
        Exception: this process' own; else the first of the others', as an OSError, a UserError or a RuntimeError.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if lost_a_peer(error):  # which nobody can be told
            raise
        own = error
    if _is_one_of_many():
        failures: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, own and _portable(own))
        own = own or next((failure for failure in failures if failure is not None), None)
    if own is not None:
        raise own


def leave_together(seconds: float = 60.0) -> None:
    """Return when all are here, or so many seconds have passed.

    Launchers kill the rest as soon as one has left with a code other than 0, whatever they are at.
    """
    if _is_one_of_many():
        with suppress(RuntimeError):  # somebody is gone: so may we
            dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds)))


def _is_one_of_many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _portable(error: Exception) -> Exception:
    """Return the same for another process: any exception's text can be pickled, not any exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror)
    if isinstance(error, UserError):
        return UserError(str(error))
    return RuntimeError(f"process {dist.get_rank()}: {type(error).__name__}: {error}")
