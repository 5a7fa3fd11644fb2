"""Reads what torch.save has written: plain values and tensors, and nothing that is larger than the file.

torch.load(weights_only=True) runs no code, but is not bounded: a file of 815 bytes makes it allocate gigabytes, a
shared dictionary unfolds to 2^40 entries, a tensor with strides of 0 has any size.
"""

import functools
import io
import math
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from struct import error
from typing import IO, Any

import torch
from torch import Tensor

from core import plain_pickle
from core.errors import one_line
from core.plain_pickle import Maker
from core.untrusted import Untrusted, beyond, bound, open_regular

VIEWS = 4  # as much as all tensors may take, in sizes of the file: some share their storage, as tied weights do
DIRECTORY_BYTES = 16 << 20  # room for 200,000 parts, each of which takes half a kilobyte of memory
CHUNK = 16 << 20
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *_STORAGES.values(),
        torch.uint16,
        torch.uint32,
        torch.uint64,
        *(getattr(torch, name) for name in dir(torch) if name.startswith("float8_")),
    )
}
"""The types that the entries of a saved tensor may have, by name."""


def load(source: Path | bytes, mapped: bool = False) -> Any:
    """Return the value that was saved, on the host.

    Args:
        source: a file, or the content of one.
        mapped: leave the tensors in the file until they are used. A file that gets shorter meanwhile ends the process.

    Raises:
        OSError: the file is not there, or may not be read.
        Untrusted: it is damaged, it has something else in it, or more than the bounds above and of `plain_pickle`.
    """
    with _opened(source) as (file, archive):
        return _Archive(archive, file, source if mapped and isinstance(source, Path) else None).load()


def check_sums(source: Path | bytes) -> str | None:
    """Read every byte, a little at a time; the part whose checksum does not hold, None: all do.

    Raises:
        OSError: the file is not there, or may not be read.
        Untrusted: it is no archive of torch.save.
    """
    with _opened(source) as (file, archive):
        _check_directory(archive, file)
        return archive.testzip()


@contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple[IO[bytes], zipfile.ZipFile]]:
    """Open a file and the archive in it; what zipfile finds wrong, in many kinds of error, becomes one."""
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        try:
            bounded = _Bounded(file, bound(DIRECTORY_BYTES))
            with zipfile.ZipFile(bounded) as archive:
                bounded.most = None
                yield file, archive
        except (zipfile.BadZipFile, EOFError, LookupError, RuntimeError, ValueError, OverflowError, error) as wrong:
            raise Untrusted(one_line(wrong) or type(wrong).__name__) from wrong


class _Bounded:
    """A file of which zipfile reads at most so many bytes at once; it reads an archive's directory in one go.

    Attributes:
        most: so many; None: any number.
    """

    def __init__(self, file: IO[bytes], most: int | None) -> None:
        self.file, self.most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if self.most is not None and size > self.most:
            raise Untrusted(beyond("the directory of its parts has too many bytes", DIRECTORY_BYTES))
        return self.file.read(size)


def _check_directory(archive: zipfile.ZipFile, file: IO[bytes]) -> int:
    """Refuse an archive that is more than its file; its size in bytes."""
    parts, size = archive.infolist(), file.seek(0, io.SEEK_END)
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise Untrusted("torch compresses nothing, this file's parts are compressed")
    if sum(part.file_size for part in parts) > size:
        raise Untrusted("its parts lie one in the other")
    if len({part.filename for part in parts}) < len(parts):
        raise Untrusted("two of its parts have one name")
    return size


class _Storage:
    """The name of a kind of storage in a pickle; None: of bytes."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


class _Part:
    """A part of the archive that tensors lie in."""

    def __init__(self, storage: torch.UntypedStorage, dtype: torch.dtype | None) -> None:
        self.storage, self.dtype = storage, dtype


class _Archive:
    """One archive while it is read."""

    def __init__(self, archive: zipfile.ZipFile, file: IO[bytes], mapped: Path | None) -> None:
        self.archive, self.file, self.mapped = archive, file, mapped
        self.size = _check_directory(archive, file)
        self.parts: dict[str, _Part] = {}
        self.left = bound(VIEWS) * self.size
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")] or ["data.pkl"]
        self.prefix = pickled.removesuffix("data.pkl")

    def load(self) -> Any:
        order = f"{self.prefix}byteorder"
        if order in self.archive.namelist() and self._read_small(order, 16) != b"little":
            raise Untrusted("its bytes are in an order that no machine of today has")
        content = self._read_small(f"{self.prefix}data.pkl", bound(plain_pickle.MAX_BYTES))
        return plain_pickle.read(content, {**_KNOWN, **self._makers()}, self._part)

    def _makers(self) -> Mapping[str, Maker]:
        return {
            "torch._utils._rebuild_tensor_v2": Maker(self._tensor),
            "torch._utils._rebuild_tensor_v3": Maker(self._tensor_of_dtype),
        }

    def _read_small(self, name: str, limit: int) -> bytes:
        if self.archive.getinfo(name).file_size > limit:
            raise Untrusted(beyond(f"its {name.removeprefix(self.prefix)} has too many bytes", plain_pickle.MAX_BYTES))
        return self.archive.read(name)

    def _part(self, reference: Any) -> _Part:
        """Return what a pickle calls ("storage", kind, name, device, number of entries)."""
        if not isinstance(reference, tuple) or len(reference) != 5:
            raise Untrusted("it refers to something that is no part of it")
        word, kind, name, _, count = reference
        if word != "storage" or not isinstance(kind, _Storage) or not isinstance(name, str) or type(count) is not int:
            raise Untrusted("it refers to something that is no part of it")
        if name not in self.parts:
            info = self.archive.getinfo(f"{self.prefix}data/{name}")
            if info.file_size != count * (kind.dtype.itemsize if kind.dtype else 1):
                raise Untrusted(f"its part {name} is not as large as it says")
            self.parts[name] = _Part(self._storage(info), kind.dtype)
        if self.parts[name].dtype is not kind.dtype:
            raise Untrusted(f"its part {name} is said to be of two kinds")
        return self.parts[name]

    def _storage(self, info: zipfile.ZipInfo) -> torch.UntypedStorage:
        with self.archive.open(info) as part:  # which holds the part's own header against the directory
            if self.mapped is not None and info.file_size:
                self.file.seek(info.header_offset + 26)
                lengths = self.file.read(4)  # of the name and of further fields, behind which the content begins
                begin = info.header_offset + 30 + int.from_bytes(lengths[:2], "little")
                begin += int.from_bytes(lengths[2:], "little")
                if begin % 16 == 0 and begin + info.file_size <= self.size:
                    mapped: torch.UntypedStorage = self._whole_file[begin : begin + info.file_size]
                    return mapped
            storage = torch.UntypedStorage(info.file_size)
            if info.file_size:
                content = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
                for start in range(0, info.file_size, CHUNK):
                    read = part.read(min(CHUNK, info.file_size - start))
                    content[start : start + len(read)] = memoryview(read)
            return storage

    @functools.cached_property
    def _whole_file(self) -> Any:
        return torch.UntypedStorage.from_file(str(self.mapped), False, self.size)

    def _tensor(
        self, part: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> Tensor:
        if not isinstance(part, _Part) or part.dtype is None:
            raise Untrusted("it has a tensor without a storage")
        return self._view(part, part.dtype, offset, size, stride, requires_grad)

    def _tensor_of_dtype(
        self, part: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, _: Any = None
    ) -> Tensor:
        if not isinstance(part, _Part) or not isinstance(dtype, torch.dtype):
            raise Untrusted("it has a tensor without a storage")
        return self._view(part, dtype, offset, size, stride, requires_grad)

    def _view(self, part: _Part, dtype: torch.dtype, offset: Any, size: Any, stride: Any, requires_grad: Any) -> Tensor:
        if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 16):
            raise Untrusted("it has a tensor of no shape")
        if any(type(number) is not int or not 0 <= number < 1 << 62 for number in (offset, *size, *stride)):
            raise Untrusted("it has a tensor of no shape")
        entries, there = math.prod(size), part.storage.nbytes() // dtype.itemsize
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if entries > there or (entries and last >= there):
            raise Untrusted("it has a tensor that is larger than its storage")
        self.left -= entries * dtype.itemsize
        if self.left < 0:
            raise Untrusted(beyond("its tensors take too many times the memory that the file does", VIEWS))
        tensor = torch.tensor([], dtype=dtype).set_(part.storage, offset, size, stride)
        return tensor.requires_grad_() if requires_grad is True and dtype.is_floating_point else tensor


def _plain(kind: type, *kinds: type) -> Callable[[Any], Any]:
    """Return a function that takes one value of these kinds."""

    def make(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise Untrusted(f"it makes a {kind.__name__} of a {type(value).__name__}")
        return kind(value)

    return make


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str | bytes) or encoding not in ("latin1", "latin-1"):
        raise Untrusted("it makes bytes of something else")
    return text.encode("latin1") if isinstance(text, str) else text


def _size(*lengths: Any) -> torch.Size:
    (values,) = lengths or ((),)
    if not isinstance(values, tuple | list) or any(type(value) is not int for value in values):
        raise Untrusted("it has a shape that is none")
    return torch.Size(values)


def _device(kind: Any, number: Any = None) -> torch.device:
    if not isinstance(kind, str) or (number is not None and type(number) is not int):
        raise Untrusted("it has a device that is none")
    return torch.device(kind) if number is None else torch.device(kind, number)


def _complex(real: Any, imaginary: Any) -> complex:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise Untrusted("it has a complex number that is none")
    return complex(real, imaginary)


def _set(values: Any = ()) -> set[Any]:
    if not isinstance(values, tuple | list) or sum(isinstance(value, tuple) for value in values) > _TUPLES:
        raise Untrusted("it has a set of something else, or of too many tuples")
    for value in values:
        plain_pickle.check_key(value)
    return set(values)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    if not isinstance(data, Tensor):
        raise Untrusted("it has a parameter that is no tensor")
    return torch.nn.Parameter(data.detach(), requires_grad is True)


def _layout(name: Any) -> torch.layout:
    if name != "torch.strided":
        raise Untrusted("it has a tensor that is not stored entry by entry")
    return torch.strided


_TUPLES = plain_pickle.MAX_TUPLE_KEYS
_BUILTINS = {
    "set": Maker(_set),
    "complex": Maker(_complex),
    "bytearray": Maker(lambda text, encoding="latin1": bytearray(_bytes(text, encoding))),
}
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": Maker(lambda: OrderedDict()),
    "collections.Counter": Maker(_plain(Counter, dict)),
    "_codecs.encode": Maker(_bytes),
    **{f"{module}.{name}": maker for module in ("builtins", "__builtin__") for name, maker in _BUILTINS.items()},
    "torch.Size": Maker(_size),
    "torch.device": Maker(_device),
    "torch.serialization._get_layout": Maker(_layout),
    "torch._utils._rebuild_parameter": Maker(_parameter),
    **{f"torch.{name}Storage": _Storage(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": _Storage(None),
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
}
"""Beside tensors, all that may stand in a checkpoint."""
