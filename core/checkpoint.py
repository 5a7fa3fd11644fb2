"""A checkpoint is one file, or a folder of torch.distributed.checkpoint, which any number of processes reads."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from core.pieces import refuse_foreign_code
from core.whole_file import save, unfinished_of


def load(path: Path) -> dict[str, Any]:
    """All of it, on the host; of a folder, the optimizer's state goes by parameters' names, as optimizer_0."""
    if path.is_dir():
        refuse_foreign_code(path)
        return _load_distributed_checkpoint(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_beside_weights(path: Path) -> dict[str, Any]:
    """What it says of the run: hyperparameters, step, states of data and callbacks.

    Raises:
        Exception: of many kinds; it is not whole, or no checkpoint at all.
    """
    if not path.is_dir():
        return load(path)  # which maps the weights, and does not read them
    if not (path / ".metadata").is_file():  # torch writes it last
        raise FileNotFoundError(path / ".metadata")
    refuse_foreign_code(path)
    return torch.load(path / _METADATA_FILENAME, map_location="cpu", weights_only=True)


class CheckpointIO(TorchCheckpointIO):
    """Saves one file, whole or not at all; loads both kinds: a run of many processes goes on in one, or in DDP's."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        unfinished = unfinished_of(path)
        if unfinished.is_dir():  # of processes that were killed at it
            shutil.rmtree(unfinished)
        if not path.is_dir():
            save(checkpoint, path)
            return
        whole = path.with_suffix(".whole")
        save(checkpoint, whole)
        put_in_place(whole, path)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        return load(Path(path)) if Path(path).is_dir() else super().load_checkpoint(path, *arguments, **options)


def put_in_place(whole: Path, path: Path) -> None:
    """Give a whole checkpoint its name. A folder replaces nothing, and nothing replaces one: it steps aside first."""
    old = path.with_name(f"{path.name}.old")
    remove(old)
    if path.exists():
        path.rename(old)
    whole.rename(path)
    remove(old)


def keep(last: Path, previous: Path) -> None:
    """Give the last checkpoint a second name, which it keeps when the next one takes its own."""
    second = previous.with_suffix(".unfinished")
    remove(second)
    if last.is_dir():
        shutil.copytree(last, second, copy_function=_link)
        remove(previous)  # a folder replaces nothing
    elif last.exists():
        _link(last, second)
        if previous.is_dir():
            remove(previous)
    else:
        return
    second.replace(previous)
    remove(second)  # two names of one file: nothing was replaced


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """A checkpoint of either kind, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
