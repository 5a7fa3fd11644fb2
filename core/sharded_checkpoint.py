"""A checkpoint in pieces: a folder of safetensors files, one of each process, and an index in JSON.

| file | what |
|---|---|
| index.json | each tensor's name, path in the nested state, type, shape and pieces; each file's size and CRC-32 |
| index.crc32 | the checksum of that file |
| rank-NNNNN.safetensors | the pieces of one process |
| values.pt | what in the states of model and optimizers is no tensor, as torch.save writes it |
| meta.pt | what else is in the checkpoint, likewise |

Version 0.1 wrote the format of torch.distributed.checkpoint, whose index is a pickle. It is read, as data: no class of
torch is made, nothing that it names is called.
"""

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core import plain_pickle, tensor_archive
from core.errors import one_line
from core.plain_pickle import Maker, Record
from core.untrusted import Untrusted, beyond, bound, check_json, is_within, open_regular, parse_json, read_bytes

INDEX, CHECKSUM, VALUES = "index.json", "index.crc32", "values.pt"
META = "meta.pt"
"""The name by which Lightning knows such a folder."""
OLD_INDEX, OLD_CHECKSUM = ".metadata", "metadata.crc32"
FORMAT, VERSION = "checkpoint in pieces", 1
MAX_INDEX = 32 << 20  # bytes; room for a million pieces
MAX_DIMENSIONS, MAX_DEPTH = 8, 16  # of a tensor, and of the state that it is in
MAX_ENTRIES = 1 << 48  # of a tensor
MAX_CUTS = MAX_DIMENSIONS  # one within the other, until the pieces of a tensor lie apart
CHUNK = 16 << 20

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and where it lies.

    Attributes:
        file: a name in the folder.
        offsets, sizes: of the box, in entries along each dimension.
        start, length: of an archive of torch.save in the file, in bytes; None: the file is one of safetensors.
    """

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int | None = None
    length: int = 0


@dataclass(frozen=True)
class Saved:
    """A tensor, as the index describes it.

    Attributes:
        path: of keys and positions in the nested state, its place.
        pieces: which fill it.
    """

    path: Path_
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Pieces:
    """The index of a folder.

    Attributes:
        tensors: by name.
        files: (size in bytes, CRC-32) by name; the latter None where none was noted.
        values: of an old folder, what is no tensor: path and place in a file.
    """

    folder: Path
    tensors: Mapping[str, Saved]
    files: Mapping[str, tuple[int, int | None]]
    values: tuple[tuple[Path_, Piece], ...] = ()
    old: bool = False
    _opened: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str, piece: Piece) -> Tensor:
        """Return one piece of a tensor.

        Raises:
            Untrusted: it is not what the index says.
            OSError: its file is not there, or cannot be read.
        """
        saved = self.tensors[name]
        if piece.start is not None:
            tensor = tensor_archive.load(self._archive(piece))
        else:
            tensor = self._open(piece.file).get_tensor(key_of(name, piece.offsets, saved.shape == piece.sizes))
        if not isinstance(tensor, Tensor) or tensor.dtype != saved.dtype or tuple(tensor.shape) != piece.sizes:
            raise Untrusted(f"{piece.file}: {name} is not what the index says")
        return tensor

    def whole(self, name: str) -> Tensor:
        """Return a tensor, of all its pieces."""
        saved = self.tensors[name]
        if len(saved.pieces) == 1:
            return self.read(name, saved.pieces[0])
        tensor = torch.zeros(saved.shape, dtype=saved.dtype)
        for piece in saved.pieces:
            box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
            tensor[box] = self.read(name, piece)
        return tensor

    def plain_values(self) -> Any:
        """Return the nested state without its tensors."""
        if not self.old:
            return tensor_archive.load(self.folder / VALUES)
        values: dict[Any, Any] = {}
        for path, piece in self.values:
            put(values, path, tensor_archive.load(self._archive(piece)))
        return values

    def state(self) -> dict[str, Any]:
        """Return the whole state, nested, on the host."""
        return joined(self.plain_values(), {saved.path: self.whole(name) for name, saved in self.tensors.items()})

    def _open(self, name: str) -> Any:
        """Return one of the folder's files, which stays open."""
        if name not in self._opened:
            self._opened[name] = open_safetensors(self.folder / name)
        return self._opened[name]

    def _archive(self, piece: Piece) -> bytes:
        assert piece.start is not None
        with open_regular(self.folder / piece.file) as file:
            file.seek(piece.start)
            return file.read(piece.length)


def open_safetensors(path: Path) -> Any:
    """Return a file of safetensors, which that library opens after holding all sizes in its header against it."""
    open_regular(path).close()  # safe_open would wait for a pipe
    return safe_open(path, framework="pt")


def is_there(folder: Path) -> bool:
    """Return whether the folder has an index, which is written last."""
    return (folder / INDEX).is_file() or (folder / OLD_INDEX).is_file()


def key_of(name: str, offsets: tuple[int, ...], whole: bool) -> str:
    """Return what a piece is called in its file."""
    return name if whole else f"{name}@{','.join(map(str, offsets))}"


def read_index(folder: Path) -> Pieces:
    """Return a folder's index, of today's form or the old one; nothing in it is larger than the files there.

    Raises:
        Untrusted: it is damaged, or describes what cannot be.
        OSError: it is not there.
    """
    try:
        pieces = _read_index(folder) if (folder / INDEX).exists() else _read_old_index(folder)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise Untrusted(f"its index cannot be read ({type(error).__name__}: {one_line(error)[:200]})") from error
    there = sum((folder / name).stat().st_size for name in pieces.files)
    for name, saved in pieces.tensors.items():
        _check(name, saved)
    if sum(math.prod(saved.shape) * saved.dtype.itemsize for saved in pieces.tensors.values()) > there:
        raise Untrusted("its tensors are larger than its files")
    return pieces


def load(folder: Path) -> dict[str, Any]:
    """Return all of a checkpoint, on the host.

    Raises:
        Exception: of several kinds; see `read_index` and `tensor_archive.load`.
    """
    return {**read_index(folder).state(), **load_meta(folder)}


def load_meta(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint has beside the states of model and optimizers."""
    content = tensor_archive.load(folder / META)
    if not isinstance(content, dict):
        raise Untrusted(f"{META} holds a {type(content).__name__}")
    return content


def damage(folder: Path, thorough: bool) -> str | None:
    """Return what is wrong with it, in words; None: nothing.

    Args:
        thorough: read every byte, a little at a time; else of the pieces only that all are there.
    """
    try:
        pieces = read_index(folder)
        for name, (size, checksum) in pieces.files.items():
            with open_regular(folder / name) as file:
                if file.seek(0, 2) != size:
                    return f"{name} is not as long as it was"
            read = thorough or name in (META, VALUES)
            if read and checksum is not None and checksum_of(folder / name) != checksum:
                return f"{name}: its checksum does not hold"
        load_meta(folder)
        pieces.plain_values()
        if pieces.old:
            return _damage_of_old(pieces, thorough)
    except (OSError, Untrusted, SafetensorError) as error:
        return one_line(error) or type(error).__name__
    return None


def checksum_of(path: Path) -> int:
    """Return the CRC-32 of a file's content."""
    checksum = 0
    with open_regular(path) as file:
        while content := file.read(CHUNK):
            checksum = zlib.crc32(content, checksum)
    return checksum


def write_index(folder: Path, tensors: Mapping[str, Saved], files: Mapping[str, tuple[int, int]]) -> None:
    """Write the index of what has been written, and its checksum."""
    numbers = {name: number for number, name in enumerate(files)}
    described = {
        name: {
            "path": list(saved.path),
            "dtype": str(saved.dtype).removeprefix("torch."),
            "shape": list(saved.shape),
            "pieces": [[numbers[piece.file], list(piece.offsets), list(piece.sizes)] for piece in saved.pieces],
        }
        for name, saved in tensors.items()
    }
    listed = [[name, size, checksum] for name, (size, checksum) in files.items()]
    index = {"format": FORMAT, "version": VERSION, "files": listed, "tensors": described}
    content = json.dumps(index, separators=(",", ":")).encode()
    if len(content) > bound(MAX_INDEX):
        raise Untrusted(beyond("the checkpoint's index would have too many bytes to be read again", MAX_INDEX))
    check_json(content, "the checkpoint's index")
    (folder / CHECKSUM).write_bytes(_sealed(content))
    (folder / INDEX).write_bytes(content)


def _sealed(content: bytes) -> bytes:
    return f"{zlib.crc32(content)}\n".encode()


def split(state: Any) -> tuple[Any, dict[Path_, Tensor]]:
    """Return (a nested state of dictionaries and lists without its tensors, these by their paths)."""
    tensors: dict[Path_, Tensor] = {}

    def without(node: Any, path: Path_) -> Any:
        if isinstance(node, dict):
            return {key: without(value, (*path, key)) for key, value in node.items() if not leaves(value, (*path, key))}
        if isinstance(node, list):
            return [None if leaves(value, (*path, n)) else without(value, (*path, n)) for n, value in enumerate(node)]
        return node

    def leaves(value: Any, path: Path_) -> bool:
        if isinstance(value, Tensor):
            tensors[path] = value
        return isinstance(value, Tensor)

    return without(state, ()), tensors


def joined(values: Any, tensors: Mapping[Path_, Tensor]) -> dict[str, Any]:
    """Return what `split` has taken apart; in place."""
    state: dict[str, Any] = values if isinstance(values, dict) else {}
    for path, tensor in tensors.items():
        put(state, path, tensor)
    return state


def name_of(path: Path_) -> str:
    """Return a tensor's name, as torch.distributed.checkpoint has it."""
    return ".".join(map(str, path))


def put(state: Any, path: Path_, value: Any) -> None:
    """Set what lies at a path; dictionaries and lists on the way are made as they are needed.

    Raises:
        Untrusted: something else lies on the way.
    """
    for key, following in zip(path, (*path[1:], None), strict=True):
        if isinstance(state, list) and isinstance(key, int) and 0 <= key <= len(state):
            state.extend([None] * (key + 1 - len(state)))
            old = state[key]
        elif isinstance(state, dict):
            old = state.get(key)
        else:
            raise Untrusted(f"there is no place for {name_of(path)[:100]}")
        if following is None:
            state[key] = value
        elif old is None:
            old = state[key] = [] if isinstance(following, int) else {}
        state = old


def _check(name: str, saved: Saved) -> None:
    """Refuse a tensor whose pieces are not just what fills it: no entry is missing, and none is there twice."""
    for piece in saved.pieces:
        if not len(piece.offsets) == len(piece.sizes) == len(saved.shape):
            raise Untrusted(f"a piece of {name[:100]} has other dimensions")
        if any(o + n > whole for o, n, whole in zip(piece.offsets, piece.sizes, saved.shape, strict=True)):
            raise Untrusted(f"a piece of {name[:100]} lies outside of it")
    pieces = [piece for piece in saved.pieces if math.prod(piece.sizes)]
    if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(saved.shape) or not _are_apart(pieces):
        raise Untrusted(f"the pieces of {name[:100]} do not fill it")


def _are_apart(pieces: list[Piece]) -> bool:
    """Return whether no two boxes overlap, told by cutting straight through between them, again and again.

    Of boxes that lie around each other like the blades of a windmill it is not: no way to share a tensor is like that.
    """
    pending = [(pieces, 0)]
    while pending:
        group, cuts = pending.pop()
        if len(group) > 1:
            dimensions = range(len(group[0].sizes))
            parts = next((parts for n in dimensions if len(parts := _cut(group, n)) > 1), [])
            if not parts or cuts > MAX_CUTS:
                return False
            pending.extend((part, cuts + 1) for part in parts)
    return True


def _cut(pieces: list[Piece], dimension: int) -> list[list[Piece]]:
    """Return the pieces in groups, one behind the other along a dimension."""
    groups: list[list[Piece]] = []
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.offsets[dimension]):
        start = piece.offsets[dimension]
        if not groups or start >= end:
            groups.append([])
        groups[-1].append(piece)
        end = max(end, start + piece.sizes[dimension])
    return groups


def _file(folder: Path, name: Any) -> str:
    """Return the name of a file in the folder, and of none elsewhere."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,200}", name, re.ASCII):
        raise Untrusted(f"a piece lies outside of it: {str(name)[:100]}")
    if not is_within(folder, folder / name):
        raise Untrusted(f"a piece lies outside of it: {name} is a link")
    return name


def _lengths(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > MAX_DIMENSIONS:
        raise Untrusted("a shape in its index is none")
    if any(type(value) is not int or not 0 <= value < MAX_ENTRIES for value in values):
        raise Untrusted("a shape in its index is none")
    return tuple(values)


def _path(keys: Any, name: str | None = None) -> Path_:
    if not isinstance(keys, list | tuple) or not 1 <= len(keys) <= MAX_DEPTH:
        raise Untrusted("a path in its index is none")
    if any(type(key) not in (str, int) for key in keys) or name not in (None, name_of(tuple(keys))):
        raise Untrusted("a path in its index is none")
    return tuple(keys)


def _read_index(folder: Path) -> Pieces:
    content = read_bytes(folder / INDEX, MAX_INDEX)
    if read_bytes(folder / CHECKSUM, 20) != _sealed(content):
        raise Untrusted(f"the checksum of {INDEX} does not hold")
    index: Any = parse_json(content, INDEX)
    if (index["format"], index["version"]) != (FORMAT, VERSION):
        raise Untrusted(f"{INDEX} is of another version of this project")
    files: dict[str, tuple[int, int | None]] = {}
    for name, size, checksum in index["files"]:
        if type(size) is not int or type(checksum) is not int:
            raise Untrusted(f"{INDEX} has a file of no size")
        files[_file(folder, name)] = size, checksum
    names = list(files)
    tensors = {
        name: Saved(
            _path(tensor["path"], name),
            tensor_archive.DTYPES[tensor["dtype"]],
            _lengths(tensor["shape"]),
            tuple(Piece(names[file], _lengths(o), _lengths(n)) for file, o, n in tensor["pieces"]),
        )
        for name, tensor in index["tensors"].items()
    }
    return Pieces(folder, tensors, files)


_TORCHS = "torch.distributed.checkpoint.metadata"
_RECORDS = (
    *(f"{_TORCHS}.{name}" for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *(f"{_TORCHS}.{name}" for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    f"{_TORCHS}._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    *(f"pathlib{part}.{name}" for part in ("", "._local") for name in ("Path", "PosixPath", "PurePosixPath")),
    *(f"pathlib{part}.WindowsPath" for part in ("", "._local")),
)
"""All classes that torch itself writes into .metadata; of their objects records are kept."""


def _record(name: str) -> Maker:
    return Maker(lambda *arguments: Record(name, arguments))


_KNOWN: dict[str, Any] = {
    **{name: _record(name) for name in _RECORDS},
    "torch.Size": Maker(lambda lengths=(): _lengths(lengths)),
    **{f"torch.{name}": dtype for name, dtype in tensor_archive.DTYPES.items()},
}


def _of(record: Any, kind: str) -> Any:
    """Return the state of a record of this class."""
    if not isinstance(record, Record) or record.name.rpartition(".")[2] != kind:
        raise Untrusted(f"{OLD_INDEX} has no {kind} where one should be")
    return record.state


def _read_old_index(folder: Path) -> Pieces:
    content = read_bytes(folder / OLD_INDEX, plain_pickle.MAX_BYTES)
    noted = folder / OLD_CHECKSUM
    if noted.exists() and int(read_bytes(noted, 20)) != zlib.crc32(content):
        raise Untrusted(f"the checksum of {OLD_INDEX} does not hold")
    metadata = _of(plain_pickle.read(content, _KNOWN), "Metadata")
    places: dict[str, dict[tuple[int, ...] | None, tuple[str, int, int]]] = {}
    files: dict[str, tuple[int, int | None]] = {}
    for index, info in metadata["storage_data"].items():
        where, what = _of(info, "_StorageInfo"), _of(index, "MetadataIndex")
        start, length = _lengths((where["offset"], where["length"]))
        if where.get("transform_descriptors"):
            raise Untrusted("its pieces are compressed or encrypted")
        file = _file(folder, where["relative_path"])
        if file not in files:
            files[file] = (folder / file).stat().st_size, None
        if files[file][0] < start + length:
            raise Untrusted(f"{file} is too short")
        offset = what.get("offset")  # of what is no tensor there is none
        places.setdefault(what["fqn"], {})[offset and _lengths(offset)] = file, start, length
    lengths = sum(length for of_one in places.values() for *_, length in of_one.values())
    if lengths > sum(size for size, _ in files.values()):
        raise Untrusted("its pieces lie one in the other")
    paths = metadata.get("planner_data") or {}
    tensors, values = {}, []
    for name, described in metadata["state_dict_metadata"].items():
        path = _path(paths.get(name, (name,)))
        if isinstance(described, Record) and described.name.endswith(".BytesStorageMetadata"):
            ((file, start, length),) = places[name].values()
            values.append((path, Piece(file, (), (), start, length)))
        else:
            tensors[name] = _old_tensor(path, _of(described, "TensorStorageMetadata"), places[name])
    return Pieces(folder, tensors, files, tuple(values), old=True)


def _old_tensor(path: Path_, state: Any, places: Mapping[tuple[int, ...] | None, tuple[str, int, int]]) -> Saved:
    dtype = _of(state["properties"], "TensorProperties")[0]
    if not isinstance(dtype, torch.dtype):
        raise Untrusted(f"{OLD_INDEX} has a tensor of no type")
    return Saved(path, dtype, _lengths(state["size"]), tuple(_old_pieces(state["chunks"], places)))


def _old_pieces(chunks: Any, places: Mapping[tuple[int, ...] | None, tuple[str, int, int]]) -> Iterator[Piece]:
    for chunk in chunks:
        box = _of(chunk, "ChunkStorageMetadata")
        offsets, sizes = _lengths(box["offsets"]), _lengths(box["sizes"])
        # torch leaves the offset out where one process has all of the tensor.
        file, start, length = places[offsets] if offsets in places else places[None]
        yield Piece(file, offsets, sizes, start, length)


def _damage_of_old(pieces: Pieces, thorough: bool) -> str | None:
    for name, saved in pieces.tensors.items():
        for piece in saved.pieces if thorough else ():
            if part := tensor_archive.check_sums(pieces._archive(piece)):
                return f"{piece.file}: the checksum of {part} does not hold"
            pieces.read(name, piece)
    return None
