"""Shards as webdataset writes them give the images that went in, and are refused where they are not whole."""

import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError
from core.untrusted import MIB
from datamodules.images.image_folder import ImageFolder
from datamodules.images.tar_shards import expand
from datamodules.index import CorpusError
from datamodules.stream import SampleStream
from tests.support.images import Files, png, samples, write_shard


def write_shards(folder: Path) -> Path:
    """Three, of which the last is held out: images 0 to 5, 6 to 11 and 12 to 15."""
    for number, (first, many) in enumerate(((0, 6), (6, 6), (12, 4))):
        write_shard(folder / f"{number:03d}.tar", samples(first, many))
    return folder


def data(path: Any, **arguments: Any) -> ImageFolder:
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3}
    return ImageFolder(**{"path": str(path), "batch_size": 2, "image_size": 6, **plain, **arguments})


def numbers(found: ImageFolder, split: str) -> dict[int, int]:
    """{the number that each image of an epoch is: its class}."""
    rows = found.samples(split).read(np.arange(len(found.source(split).labels)))
    return dict(
        zip(np.rint(rows["images"][:, 0, 0, 0] * 255).astype(int).tolist(), rows["labels"].tolist(), strict=True)
    )


@pytest.mark.parametrize("path", ["", "{000..002}.tar", "train and val"])
def test_all_images_are_there_with_their_classes(path: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards")
    if path == "train and val":
        for number, split in enumerate(("train", "train", "val")):
            (folder / split).mkdir(exist_ok=True)
            (folder / f"{number:03d}.tar").rename(folder / split / f"{number:03d}.tar")
        path = ""
    found = data(f"{folder}/{path}" if path else folder)
    found.check()
    assert (found.num_classes, found.classes, found.num_val_samples) == (2, None, 4)
    assert numbers(found, "train") == {n: n % 2 for n in range(12)}
    assert numbers(found, "val") == {n: n % 2 for n in range(12, 16)}


@pytest.mark.parametrize(
    ("names", "held_out"),
    [
        (["train.tar", "test.tar"], ["test.tar"]),
        (["x-train-000.tar", "x-train-001.tar", "x-val-000.tar", "x-val-001.tar"], ["x-val-000.tar", "x-val-001.tar"]),
        (["8.tar", "9.tar", "10.tar"], ["10.tar"]),
        (["latest-1.tar", "latest-2.tar"], ["latest-2.tar"]),
    ],
    ids=str,
)
def test_what_is_held_out_goes_by_names_and_is_said(
    names: list[str], held_out: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(names):
        write_shard(tmp_path / name, samples(4 * number, 4))
    found = data(tmp_path)
    found.check()
    assert capsys.readouterr().out == f"Held out for validation: {', '.join(held_out)}\n"
    expected = {4 * number + n for number, name in enumerate(names) for n in range(4) if name in held_out}
    assert set(numbers(found, "val")) == expected
    assert set(numbers(found, "train")) == set(range(4 * len(names))) - expected


@pytest.mark.parametrize(
    "names", [["train-0", "val-0", "more"], ["train", "val", "test"], ["val-0", "val-1"], ["train-val", "val"]], ids=str
)
def test_names_that_leave_open_what_is_held_out_are_refused(names: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        write_shard(tmp_path / f"{name}.tar", samples(4 * number, 4))
    with pytest.raises(ConfigError, match=r"data\.path=.*each says by its name"):
        data(tmp_path)


def test_classes_that_nothing_is_trained_on_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of classes that somebody counts from 1."""
    for number, classes in enumerate(([1, 2, 4], [1, 3, 4])):
        files = {f"{n}.png": png(n) for n in range(3)} | {f"{n}.cls": str(c).encode() for n, c in enumerate(classes)}
        write_shard(tmp_path / f"{number}.tar", files)
    data(tmp_path).check()
    assert "Of 5 classes, counted from 0, there is no training image of 0, 3\n" in capsys.readouterr().out


def test_folders_are_what_is_meant_where_archives_lie_beside_them(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.tar", {"0.png": png(1)})
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(2):
                (tmp_path / split / name / f"{n}.png").write_bytes(png(n))
    write_shard(tmp_path / "train/stray.tar", {"0.png": png(1)})
    found = data(tmp_path)
    found.check()
    assert (found.classes, found.num_val_samples) == (["cat", "dog"], 4)


def test_a_stream_goes_on_bit_for_bit_at_any_number_of_processes(tmp_path: Path) -> None:
    found = data(write_shards(tmp_path / "shards"))
    whole = [SampleStream(found.samples("train"), 4).read(n) for n in range(6)]
    again = pickle.loads(pickle.dumps(data(tmp_path / "shards").samples("train")))  # as a worker gets it
    for rank in (0, 1):
        part = SampleStream(again, 4, first_sample=12, rank=rank, world_size=2)
        for number in range(3):
            for name, rows in part.read(number).items():
                assert np.array_equal(rows, whole[3 + number][name][2 * rank : 2 * rank + 2])


def test_other_shards_are_another_collection(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards")
    before = data(folder).stream_identity
    assert data(f"{folder}/{{000..002}}.tar").stream_identity == before
    write_shard(folder / "001.tar", {**samples(6, 6), "0006.cls": b"1"})
    assert data(folder).stream_identity != before, "one image is of another class"


def test_what_belongs_to_no_image_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "shards")
    write_shard(folder / "001.tar", {**samples(6, 6), "0006.json": b"{}", "0007.json": b"{}", "0099.cls": b"1"})
    found = data(folder)
    found.check()
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "Held out for validation: 002.tar"
    assert (
        said.splitlines(keepends=True)[1]
        == f"Left out of {folder}: 3 that are no images (2 .json, 1 .cls without an image)\n"
    )
    assert set(numbers(found, "train")) == set(range(12))


def test_a_shard_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards")
    whole = (folder / "000.tar").read_bytes()
    header = bytearray(whole)
    header[2 * 512 + 148 : 2 * 512 + 156] = b"00000000"  # the checksum of the second file's header
    with tarfile.open(folder / "000.tar") as archive:
        last = max(member.offset_data for member in archive)
    for broken in (whole[: last + 1], bytes(header), whole[: 512 * 3 + 100], b"no archive at all" * 100):
        (folder / "000.tar").write_bytes(broken)
        with pytest.raises(CorpusError, match=r"000\.tar cannot be read as an uncompressed tar archive"):
            data(folder).check()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": png(1)}, r"a\.png in .*000\.tar has no class"),
        ({"a.png": png(1), "a.cls": b"cat"}, r"a\.cls in .*000\.tar says 'cat', where the number of a class"),
        ({"a.png": png(1), "a.cls": b"-1"}, r"says '-1'"),
        ({"a.png": png(1), "a.jpg": png(1), "a.cls": b"0"}, r"two files for the same sample: a\.jpg"),
        (
            {"a.png": b"none", "a.cls": b"0", "b.png": b"none", "b.cls": b"1"},
            r"[ab]\.png in .*000\.tar cannot be read as",
        ),
        ({"a.txt": b"none"}, r"shards with images: those of train have none"),
    ],
)
def test_what_is_no_sample_is_refused(files: Files, message: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "000.tar", files)
    write_shard(tmp_path / "001.tar", samples(0, 2))
    with pytest.raises((CorpusError, ConfigError), match=message):
        data(tmp_path).check()


def promise(path: Path, *members: tuple[str, int, bytes]) -> None:
    """A sparse archive: (name, size, kind) of its members, which have nothing but zeros in them."""
    with path.open("wb") as file:
        for name, size, kind in members:
            header = tarfile.TarInfo(name)
            header.size, header.type = size, kind
            file.write(header.tobuf(tarfile.GNU_FORMAT))
            file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.write(bytes(1024))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.png", 0, tarfile.REGTYPE), ("k.cls", 64 * MIB, tarfile.REGTYPE)], r"k\.cls in .* has 67,108,864 bytes"),
        ([("k.png", 33, tarfile.REGTYPE), ("k.cls", 33, tarfile.REGTYPE)], "where the number of a class is expected"),
        ([("k.png", 256 * MIB + 1, tarfile.REGTYPE)], "has 268,435,457 bytes; the bound is 268,435,456"),
        ([("x", 64 * MIB, tarfile.GNUTYPE_LONGNAME)], "a name in it has more than 1,048,576 bytes; the bound is"),
        ([("x", 64 * MIB, tarfile.XHDTYPE)], "a name in it has more than 1,048,576 bytes; the bound is"),
        ([("x", 9, tarfile.XGLTYPE)] * 3000, "too many headers before one file"),
    ],
)
def test_a_member_that_promises_much_is_refused_before_it_is_read(
    members: list[tuple[str, int, bytes]], message: str, tmp_path: Path
) -> None:
    write_shard(tmp_path / "a.tar", samples(0, 2))
    promise(tmp_path / "b.tar", *members)
    tracemalloc.start()
    with pytest.raises(CorpusError, match=message):
        data(tmp_path).check()
    assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    tracemalloc.stop()


def test_a_pattern_that_names_nothing_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards")
    for pattern, message in (
        ("{000..004}.tar", r"2 of 5 are not, as .*003\.tar"),
        ("{2..1}.tar", r"ranges that go up"),
        ("{0..999999}.tar", r"at most 100000 shards"),
        ("000.tar", r"at least two shards"),
    ):
        with pytest.raises(ConfigError, match=message):
            data(f"{folder}/{pattern}")
    (folder / "train").mkdir()
    (folder / "000.tar").rename(folder / "train/000.tar")
    with pytest.raises(ConfigError, match=r"\.tar in .*val as well"):
        data(folder)


@pytest.mark.parametrize("place", ["", "train", "val"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_what_is_no_file_is_refused_and_not_waited_for(place: str, kind: str, tmp_path: Path) -> None:
    for folder in {"": [""], "train": ["train", "val"], "val": ["train", "val"]}[place]:
        for name in ("a", "b"):
            write_shard(tmp_path / folder / f"{name}.tar", samples(0, 2))
    shard = tmp_path / place / "b.tar"
    shard.unlink()
    make: dict[str, Callable[[], None]] = {
        "pipe": lambda: os.mkfifo(shard),
        "device": lambda: shard.symlink_to("/dev/zero"),
        "link": lambda: shard.symlink_to("nowhere"),
    }
    make[kind]()
    with pytest.raises(ConfigError, match=r"\.tar are all regular files: 1 are not, as .*b\.tar"):
        data(tmp_path)


def test_ranges_keep_their_digits() -> None:
    assert [str(path) for path in expand("a/{08..11}-{0..1}.tar")] == [
        f"a/{n:02d}-{m}.tar" for n in (8, 9, 10, 11) for m in (0, 1)
    ]
