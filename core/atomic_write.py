"""Files that are there whole or not at all, and how to tell one that has been damaged since."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError, one_line
from core.printable import printable


class NotWritten(UserError):
    """A file that could not be written; what was there under its name is untouched."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} could not be written ({reason}); what was there under this name is untouched")


def unfinished_of(path: Path) -> Path:
    """Return the name under which a file or folder is written before it is whole."""
    return path.with_name(f"{path.name}.unfinished")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under another name, wait until it is on the disk, and give it its own.

    Processes that write the same file at the same time do so one after the other.

    Args:
        write: makes the file of the name that it is given.

    Raises:
        NotWritten: a full disk, a folder that is gone or may not be written to, a pipe or a device of this name.
    """
    unfinished = unfinished_of(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # the administrator could replace /dev/null
            raise NotWritten(path, "it is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(unfinished):
            try:
                write(unfinished)
                sync(unfinished)
                unfinished.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    unfinished.unlink()
                raise
        sync(path.parent)
    except (OSError, RuntimeError) as error:
        raise NotWritten(path, _reason(error)) from error


def save(content: Any, path: Path) -> None:
    """Save a value as torch.save does, whole or not at all.

    Raises:
        NotWritten: see `write_whole`.
    """
    import torch

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as file:  # torch's own writer would not say why it failed
            torch.save(content, file)

    write_whole(path, write)


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Save tensors as safetensors does, in a file that may be read by whoever may read the others beside it.

    safetensors by itself makes it for its owner alone: nobody else could load an export, or resume from the pieces.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def damage(path: Path) -> str | None:
    """Return what is wrong with a file of torch.save, in words; None: nothing.

    It is a zip archive of uncompressed parts with a CRC-32 of each: every byte is read, a little at a time, no code in
    it is run.
    """
    from core import tensor_archive

    try:
        if part := tensor_archive.check_sums(path):
            return f"the checksum of {part} does not hold"
        tensor_archive.load(path, mapped=True)
    except Exception as error:  # of zipfile's and the file system's many kinds
        return one_line(error).partition(". ")[0] or type(error).__name__  # zipfile's EOFError says nothing
    return None


def is_whole(checkpoint: Path, thorough: bool = True) -> bool:
    """Return whether a checkpoint is undamaged; where it is not, that is said.

    Args:
        thorough: read all of one in pieces; one process is enough for that, and tells the others.
    """
    wrong = damage_of(checkpoint, thorough)
    if wrong:
        print(f"{printable(checkpoint)} is damaged and passed over: {printable(wrong)}", file=sys.stderr)
    return not wrong


def damage_of(checkpoint: Path, thorough: bool) -> str | None:
    """Return what is wrong with a checkpoint of either kind; None: nothing."""
    from core import sharded_checkpoint

    return sharded_checkpoint.damage(checkpoint, thorough) if checkpoint.is_dir() else damage(checkpoint)


@contextlib.contextmanager
def _alone(unfinished: Path) -> Iterator[None]:
    """Make the unfinished file, or take over one that a killed process has left, and lock it meanwhile."""
    while True:
        # In a folder from elsewhere a link could lead to any file of the user's, and a pipe would take no end of it.
        if unfinished.is_symlink() or unfinished.is_fifo():
            unfinished.unlink()
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                is_ours = os.path.samestat(unfinished.stat(), os.fstat(descriptor))
            except FileNotFoundError:
                is_ours = False
            if is_ours:  # and not the one that another process has finished meanwhile
                yield
                return
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """Return the operating system's word; torch's writer hides it behind an error of its own."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__context__
    return one_line(error)
