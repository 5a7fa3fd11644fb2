"""A folder of torch.distributed.checkpoint: its pickles, which torch would load whatever is in them, and its damage."""

import io
import pickle
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME

from core import whole_file
from core.errors import ConfigError, one_line

CHECKSUM = "metadata.crc32"

_OF = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},  # where Python 3.13 has them
    "collections": {"OrderedDict"},
}
"""By module, all that torch itself writes into .metadata, beside torch.Size and dtypes."""


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in _OF.get(module, ())
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            known = True
        if not known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def refuse_foreign_code(folder: Path) -> None:
    """Look through all that torch would unpickle, and run none of it.

    Raises:
        ConfigError: names the folder and what is wrong: code, a piece outside of the folder, or damage.
    """
    try:
        _look_through(folder)
    except Exception as error:  # of pickle's, torch's and the file system's many kinds
        reason = str(error).partition("\n")[0]
        raise ConfigError("ckpt_path", str(folder), f"a checkpoint that torch alone has written ({reason})") from error


def seal(folder: Path) -> None:
    """Note the checksum of the one file in which torch has none."""
    (folder / CHECKSUM).write_text(f"{zlib.crc32((folder / '.metadata').read_bytes())}\n")


def damage(folder: Path, thorough: bool) -> str | None:
    """What is wrong with it, in words; None: nothing. No code in it is run.

    A piece is an archive of torch.save, with a checksum of every part; a file holds many, one after another.

    Args:
        thorough: read every byte, one piece at a time in memory; else of the pieces only that all are there.
    """
    try:
        noted = folder / CHECKSUM
        if noted.exists() and int(noted.read_text()) != zlib.crc32((folder / ".metadata").read_bytes()):
            return "the checksum of .metadata does not hold"
        if wrong := whole_file.damage(folder / _METADATA_FILENAME):
            return f"{_METADATA_FILENAME}: {wrong}"
        for piece in _look_through(folder).storage_data.values():
            if (folder / piece.relative_path).stat().st_size < piece.offset + piece.length:
                return f"{piece.relative_path} is too short"
            if thorough and (wrong := whole_file.damage(_read(folder, piece))):
                return f"{piece.relative_path}: {wrong}"
    except Exception as error:  # as above
        return one_line(error) or type(error).__name__
    return None


def _look_through(folder: Path) -> Any:
    """torch's metadata, after a look at every pickle among the pieces."""
    with (folder / ".metadata").open("rb") as file:
        metadata = _Metadata(file).load()
    for index, piece in metadata.storage_data.items():
        if not (folder / piece.relative_path).resolve().is_relative_to(folder.resolve()):
            raise pickle.UnpicklingError(f"a piece lies outside of it: {piece.relative_path}")
        if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
            torch.load(_read(folder, piece), weights_only=True)
    return metadata


def _read(folder: Path, piece: Any) -> io.BytesIO:
    with (folder / piece.relative_path).open("rb") as file:
        file.seek(piece.offset)
        return io.BytesIO(file.read(piece.length))
