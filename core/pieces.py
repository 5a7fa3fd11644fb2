"""The pickles in a folder of torch.distributed.checkpoint, which torch would load whatever is in them."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from core.errors import ConfigError

_OF = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
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
        with (folder / ".metadata").open("rb") as file:
            metadata = _Metadata(file).load()
        for index, piece in metadata.storage_data.items():
            path = (folder / piece.relative_path).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise pickle.UnpicklingError(f"a piece lies outside of it: {piece.relative_path}")
            if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
                with path.open("rb") as file:
                    file.seek(piece.offset)
                    torch.load(io.BytesIO(file.read(piece.length)), weights_only=True)
    except Exception as error:  # of pickle's, torch's and the file system's many kinds
        reason = str(error).partition("\n")[0]
        raise ConfigError("ckpt_path", str(folder), f"a checkpoint that torch alone has written ({reason})") from error
