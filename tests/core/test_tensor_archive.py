"""What torch.save wrote is read as torch.load reads it; what torch.load would make gigabytes of is refused."""

import io
import os
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from core.tensor_archive import check_sums, load
from core.untrusted import Untrusted
from tests.support.archives import assert_same

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint64)


def values() -> dict[str, Any]:
    tied = torch.randn(3, 2)
    state = OrderedDict(weight=tied, other=tied)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return {
        **{str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in (*FLOATS, *WHOLE)},
        "complex": torch.randn(2, dtype=torch.complex64),
        "transposed": torch.randn(4, 5).T,
        "part": torch.arange(10)[2:5],
        "empty": torch.empty(0, 3),
        "one": torch.tensor(3),
        "state": state,
        "gradient": torch.ones(2, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "plain": {"a": [1, 2.5, None, True, "x", (1, 2), {3, 4}, Counter("aab"), 3 + 4j, b"\xff\0", bytearray(b"ab")]},
        "torch": [torch.device("cuda", 1), torch.Size([1, 2]), torch.bfloat16, torch.strided],
    }


@pytest.mark.parametrize("how", ["from the file", "mapped", "from memory"])
def test_it_reads_what_torch_reads(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(values(), path)
    ours = load(path.read_bytes() if how == "from memory" else path, mapped=how == "mapped")
    theirs = torch.load(path, weights_only=True)
    assert_same(ours, theirs)
    assert vars(ours["state"]) == vars(theirs["state"])
    assert ours["state"]["weight"].data_ptr() == ours["state"]["other"].data_ptr(), "tied"


def test_what_is_mapped_can_be_saved_again_alone(tmp_path: Path) -> None:
    torch.save({"large": torch.zeros(100_000), "small": torch.ones(3)}, tmp_path / "a.pt")
    torch.save(load(tmp_path / "a.pt", mapped=True)["small"], tmp_path / "b.pt")
    assert (tmp_path / "b.pt").stat().st_size < 5000


def test_a_flipped_bit_is_found_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.zeros(1000), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert check_sums(path) == "a/data/0"
    with pytest.raises(Untrusted, match="Bad CRC-32"):
        load(path)


def archive(path: Path, pickled: bytes, parts: dict[str, bytes] | None = None, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("a/data.pkl", pickled)
        for name, content in (parts or {}).items():
            file.writestr(f"a/{name}", content)
    return path


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00", count: bytes = b"K\x04") -> bytes:
    """The pickle of a tensor in 4 floats."""
    storage = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpu" + count + b"tQ"
    rest = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + rest + b"tR."


FOUR = {"data/0": bytes(16)}
HUGE = b"\x8a\x06\x00\x00\x00\x00\x40\x00"  # 2^38
BOMBS: dict[str, tuple[bytes, dict[str, bytes], str]] = {
    "a stride of 0": (tensor(HUGE + b"\x85", b"K\x00\x85"), FOUR, "larger than its storage"),
    "a size beyond": (tensor(b"K\x05\x85", b"K\x01\x85"), FOUR, "larger than its storage"),
    "an offset beyond": (tensor(b"K\x01\x85", b"K\x01\x85", offset=b"K\x04"), FOUR, "larger than its storage"),
    "a stride beyond": (tensor(b"K\x02\x85", HUGE + b"\x85"), FOUR, "larger than its storage"),
    "a negative stride": (tensor(b"K\x01\x85", b"J\xff\xff\xff\xff\x85"), FOUR, "of no shape"),
    "a storage that is none": (tensor(b"K\x01\x85", b"K\x01\x85", count=HUGE), FOUR, "not as large as it says"),
    "a part that is missing": (tensor(b"K\x01\x85", b"K\x01\x85"), {}, "There is no item named"),
    "gigabytes of nothing": (b"\x80\x02c__builtin__\nbytearray\n" + HUGE + b"\x85R.", {}, "makes bytes of something"),
    "a quantized tensor": (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.", {}, "which no checkpoint needs"),
    "a sparse tensor": (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.", {}, "which no checkpoint needs"),
    "a tensor made new": (b"\x80\x02ctorch\nTensor\n" + HUGE + b"\x85R.", {}, "which no checkpoint needs"),
    "another byte order": (b"\x80\x02N.", {"byteorder": b"big"}, "bytes are in an order"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("mapped", [True, False])
def test_what_is_larger_than_its_file_is_refused(tmp_path: Path, name: str, mapped: bool) -> None:
    pickled, parts, reason = BOMBS[name]
    with pytest.raises(Untrusted, match=reason):
        load(archive(tmp_path / "bomb.pt", pickled, parts), mapped)


def test_the_form_of_those_bombs_is_torchs_own(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", tensor(b"K\x02\x85", b"K\x02\x85"), FOUR)
    assert load(path).tolist() == [0.0, 0.0]


def test_many_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    whole = torch.zeros(1000)
    torch.save([whole.view(10, 100), whole], tmp_path / "two.pt")
    assert len(load(tmp_path / "two.pt")) == 2
    torch.save([whole.view(10, 100) for _ in range(50)], tmp_path / "fifty.pt")
    with pytest.raises(Untrusted, match="too many times the memory that the file does; the bound is 4"):
        load(tmp_path / "fifty.pt")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_nothing_is_unpacked(tmp_path: Path, compression: int) -> None:
    path = archive(tmp_path / "bomb.pt", bytes(1 << 22), compression=compression)
    for read in (load, check_sums):
        with pytest.raises(Untrusted, match="parts are compressed"):
            read(path)


def test_a_name_that_two_parts_have_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", b"\x80\x02N.")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as file:
        file.writestr("a/data.pkl", b"\x80\x02K\x01.")
    with pytest.raises(Untrusted, match="two of its parts have one name"):
        load(path)


def test_parts_that_lie_one_in_the_other_are_refused(tmp_path: Path) -> None:
    """Of a directory that names one content many times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02N.")
        file.writestr("a/data/0", bytes(100_000))
        entry = file.infolist()[1]
        for number in range(1, 20):
            copy = zipfile.ZipInfo(f"a/data/{number}")
            for name in ("file_size", "compress_size", "CRC", "header_offset", "external_attr"):
                setattr(copy, name, getattr(entry, name))
            file.filelist.append(copy)
            file.NameToInfo[copy.filename] = copy
    (tmp_path / "bomb.pt").write_bytes(buffer.getvalue())
    with pytest.raises(Untrusted, match="lie one in the other"):
        check_sums(tmp_path / "bomb.pt")


@pytest.mark.parametrize("read", [load, check_sums])
def test_a_directory_of_many_parts_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    """Each of 50 bytes in the file, and ten times as much in memory."""
    path = tmp_path / "many.pt"
    torch.save({"a": [torch.zeros(1) for _ in range(100)]}, path)
    with zipfile.ZipFile(path) as archive:
        size = os.path.getsize(path) - archive.start_dir
    monkeypatch.setattr("core.tensor_archive.DIRECTORY_BYTES", size)
    read(path)
    monkeypatch.setattr("core.tensor_archive.DIRECTORY_BYTES", 100 * 50)
    with pytest.raises(Untrusted, match="directory of its parts has too many bytes; the bound is 5,000, and READ_LIM"):
        read(path)


@pytest.mark.parametrize("place", ["/dev/zero", "pipe", "folder"])
def test_only_a_file_is_read(tmp_path: Path, place: str) -> None:
    path = tmp_path / place if place != "/dev/zero" else Path(place)
    if place == "pipe":
        os.mkfifo(path)
    elif place == "folder":
        path.mkdir()
    with pytest.raises((Untrusted, OSError)):
        load(path)


def test_815_bytes_take_no_gigabytes(tmp_path: Path) -> None:
    size = b"J\x00\x00\x00\x20"  # 512 MiB
    path = archive(tmp_path / "bomb.pt", b"\x80\x02c__builtin__\nbytearray\n" + size + b"\x85R.", {"version": b"3\n"})
    assert path.stat().st_size < 815
    tracemalloc.start()
    try:
        with pytest.raises(Untrusted):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        torch.load(path, weights_only=True)
        assert tracemalloc.get_traced_memory()[1] > 1 << 29, "torch alone takes them"
    finally:
        tracemalloc.stop()
