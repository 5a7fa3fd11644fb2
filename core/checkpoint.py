"""A checkpoint is one file, or a folder in pieces, which any number of processes reads: core/sharded_checkpoint.py."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from core import sharded_checkpoint, tensor_archive
from core.atomic_write import save, unfinished_of
from core.checkpoint_values import checked


def load(path: Path) -> dict[str, Any]:
    """Return the whole checkpoint, on the host; a folder's optimizer state goes by parameters' names, as optimizer_0.

    Nothing but plain values and tensors is made, and no more of them than the file has; the latter are mapped.

    Raises:
        Exception: of many kinds; it is not whole, or no checkpoint at all.
    """
    content = sharded_checkpoint.load(path) if path.is_dir() else tensor_archive.load(path, mapped=True)
    return checked(content, path.parent)


def load_beside_weights(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run: hyperparameters, step, states of data and callbacks.

    Raises:
        Exception: of many kinds; it is not whole, or no checkpoint at all.
    """
    if not path.is_dir():
        return load(path)  # which maps the weights, and does not read them
    meta = sharded_checkpoint.load_meta(path)
    values = sharded_checkpoint.read_index(path).plain_values()
    checked({**(values if isinstance(values, dict) else {}), **meta}, path.parent)
    return meta


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
        # Not mapped: the run would go on to use the file's memory for the optimizer's state.
        path = Path(path)
        return load(path) if path.is_dir() else checked(tensor_archive.load(path), path.parent)

    def remove_checkpoint(self, path: Any) -> None:
        # Lightning's own removes by fsspec, whatever a path names: local:///home/me is no file below this folder there.
        remove(Path(path))


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


def folder_beside(checkpoint: Path, step: int) -> Path:
    """Return the folder of what belongs to the checkpoint of a step, but goes into none."""
    return checkpoint.parent / f"step_{step}"


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a checkpoint of either kind, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
