"""Composes another configuration amid a job of Hydra's, which a study's run is."""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.global_hydra import GlobalHydra


@contextmanager
def composing_anew() -> Iterator[None]:
    """Let composing begin as in a process of its own, and give the job back its state."""
    job = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        if job is not None:
            GlobalHydra.instance().initialize(job)
