"""Images in tar archives as webdataset writes them: of each sample KEY.png (or jpg, ...) and KEY.cls, its class."""

import hashlib
import io
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import one_line, require
from core.untrusted import MIB, beyond, bound
from datamodules.images.class_folders import ENDINGS, SPLITS
from datamodules.images.sources import Labels, Pixels, decode
from datamodules.index import CorpusError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 100_000
NAMED, MANY = 5, 100_000
"""Shards or classes that are named, and classes that are looked at."""
TRAIN_WORDS = {"train", "training"}
SPLIT_WORDS = {*TRAIN_WORDS, "val", "valid", "validation", "test", "dev"}
"""Of names of shards, that say of which split they are."""
MAX_CLASS_BYTES = 32
"""Of a .cls file, which has a number in it."""
MAX_IMAGE_BYTES = 256 * MIB
"""Of an image's file, which is read whole: as much as the most pixels that PIL takes to be safe have in memory."""
MAX_HEADER_BYTES = MIB
"""Of what tarfile reads at once: headers, and long names, whose sizes stand in the archive."""


class Place(NamedTuple):
    """Says where an image is."""

    shard: Path
    name: str
    offset: int
    size: int


class TarImages:
    """The images of one split, read from the place in the archive where each is.

    Args:
        places: of the images.
        labels: the class of each.
    """

    def __init__(self, places: Sequence[Place], labels: Labels) -> None:
        self.places, self.labels = places, labels

    def name(self, index: int) -> str:
        return f"{self.places[index].name} in {self.places[index].shard}"

    def image(self, index: int) -> Pixels:
        return decode(io.BytesIO(_read(self.places[index])), self.name(index))


def _read(place: Place) -> bytes:
    try:
        with open(place.shard, "rb") as archive:
            archive.seek(place.offset)
            return archive.read(place.size)
    except OSError as error:
        raise CorpusError(f"{place.shard} cannot be read: {one_line(error)}") from error


class _Archive(io.BufferedReader):
    """An archive whose headers are read, no member's content.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        most = bound(MAX_HEADER_BYTES)
        if size is None or not 0 <= size <= most:
            raise tarfile.ReadError(beyond(f"a header or a name in it has more than {most:,} bytes", MAX_HEADER_BYTES))
        return super().read(size)


class TarShards:
    """Classes are the numbers in the .cls files, from 0 on.

    Of FOLDER/train/*.tar and FOLDER/val/*.tar the latter are held out; of other shards those whose names say that they
    are of another split than train, or else the last one, in the order of the numbers in their names.

    Args:
        shards: of each split.
        path: as the user has it, for messages.

    Attributes:
        classes: have no names.
        skipped: how many files there are in the archives that belong to no image, by what they are.
    """

    classes: list[str] | None = None

    def __init__(self, shards: dict[str, list[Path]], path: str) -> None:
        self.shards, self.path = shards, path
        self.skipped: Counter[str] = Counter()

    def remarks(self) -> Iterator[str]:
        """Yield, in lines, what the user may not expect: what is held out, and classes that nothing is trained on."""
        held_out = ", ".join(shard.name for shard in self.shards["val"][:NAMED])
        yield f"Held out for validation: {held_out}{', ...' * (len(self.shards['val']) > NAMED)}"
        missing = np.setdiff1d(np.arange(min(self.num_classes, MANY)), self._sources["train"].labels)
        if len(missing):
            named = ", ".join(map(str, missing[:NAMED].tolist()))
            more = ", ..." * (len(missing) > NAMED or self.num_classes > MANY)
            yield f"Of {self.num_classes} classes, counted from 0, there is no training image of {named}{more}"

    @property
    def num_classes(self) -> int:
        return 1 + int(max(source.labels.max() for source in self._sources.values()))

    @cached_property
    def _sources(self) -> dict[str, TarImages]:
        found = {}
        for split in SPLITS:
            samples = [sample for shard in self.shards[split] for sample in self._list(shard)]
            require(bool(samples), "data.path", self.path, f"shards with images: those of {split} have none")
            labels = np.array([label for _, label in samples], np.int64)
            found[split] = TarImages([place for place, _ in samples], labels)
        return found

    def _list(self, shard: Path) -> list[tuple[Place, int]]:
        """Return the images of a shard with their classes, in its order.

        Raises:
            CorpusError: it is no whole, uncompressed tar archive, or an image in it has no class.
        """
        images: dict[str, Place] = {}
        classes: dict[str, Place] = {}
        try:
            with _Archive(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                size = shard.stat().st_size
                for member in archive:
                    if not member.isreg() or member.issparse():
                        self.skipped["other than files"] += not member.isdir()
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} ends behind the end of the archive")
                    folder, name = os.path.split(member.name)
                    stem, _, ending = name.partition(".")  # webdataset's keys end at the first dot of the name
                    key, ending = f"{folder}/{stem}", f".{ending.lower()}"
                    place = Place(shard, member.name, member.offset_data, member.size)
                    known = classes if ending == ".cls" else images if ending in ENDINGS else None
                    if known is None:
                        self.skipped[ending] += 1
                    elif key in known:
                        raise CorpusError(f"{shard} has two files for the same sample: {member.name}")
                    elif known is images and member.size > bound(MAX_IMAGE_BYTES):
                        what = f"{member.name} in {shard} has {member.size:,} bytes"
                        raise CorpusError(beyond(what, MAX_IMAGE_BYTES))
                    else:
                        known[key] = place
                _check_end(archive)
        except RecursionError as error:  # a header of names before another one, and so on
            raise CorpusError(f"{shard} cannot be read as a tar archive: too many headers before one file") from error
        except (tarfile.TarError, OSError, ValueError) as error:
            raise CorpusError(f"{shard} cannot be read as an uncompressed tar archive: {one_line(error)}") from error
        self.skipped[".cls without an image"] += len(classes.keys() - images.keys())
        return [(place, _label(place, classes.get(key))) for key, place in images.items()]

    def source(self, split: str) -> TarImages:
        return self._sources[split]

    @property
    def content(self) -> str:
        """Return a digest of names, sizes and classes of all images: to read them would take as long as an epoch."""
        digest = hashlib.sha256()
        for split, source in self._sources.items():
            for place, label in zip(source.places, source.labels.tolist(), strict=True):
                name = os.fsencode(f"{split}/{place.shard.name}/{place.name}")
                digest.update(name + f"\0{place.size} {label}\n".encode())
        return digest.hexdigest()


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse an archive that goes on behind a damaged header, at which tarfile ends without a word."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {archive.offset} is damaged")


def _label(image: Place, place: Place | None) -> int:
    if place is None:
        raise CorpusError(f"{image.name} in {image.shard} has no class: there is no .cls beside it")
    if place.size > MAX_CLASS_BYTES:
        what = f"{place.name} in {place.shard} has {place.size:,} bytes"
        raise CorpusError(f"{what}, where the number of a class is expected, in at most {MAX_CLASS_BYTES}")
    text = _read(place).decode("ascii", "replace").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise CorpusError(f"{place.name} in {place.shard} says {text!r}, where the number of a class is expected")
    return int(text)


def find_shards(path: str) -> dict[str, list[Path]] | None:
    """Return the archives of each split; None: the path names none.

    Args:
        path: a folder with .tar in it, or in its folders train and val; or a pattern, as shards/{000..010}.tar, where a
            range stands for all numbers in it, with as many digits.

    Raises:
        ConfigError: a shard is missing or no regular file, or there are too few to hold one out.
    """
    folder = Path(path)
    if path.endswith(".tar"):
        shards = expand(path)
        missing = [str(shard) for shard in shards if not shard.is_file()]
        valid = f"files that are there: {len(missing)} of {len(shards)} are not, as {missing[0]}" if missing else ""
        require(not missing, "data.path", path, valid)
    else:
        of_splits = {split: _shards_in(folder / split, path) for split in SPLITS}
        if any(of_splits.values()):
            for split, found in of_splits.items():
                require(bool(found), "data.path", path, f"a folder with .tar in {folder / split} as well")
            return of_splits
        shards = _shards_in(folder, path)
        if not shards:
            return None
    valid = "at least two shards, of which the last is held out; or a folder with train/*.tar and val/*.tar"
    require(len(shards) >= 2, "data.path", path, valid)
    shards.sort(key=_in_order)
    splits = {shard: SPLIT_WORDS & set(re.findall(r"[a-z]+", shard.stem.lower())) for shard in shards}
    held_out = [shard for shard, words in splits.items() if words - TRAIN_WORDS]
    if not held_out:
        return {"train": shards[:-1], "val": shards[-1:]}
    of_train = [shard for shard, words in splits.items() if words and words <= TRAIN_WORDS]
    valid = "shards of which each says by its name whether it is of train or of one other split, as val"
    apart = len(of_train) + len(held_out) == len(shards) and all(
        splits[shard] == splits[held_out[0]] for shard in held_out
    )
    require(bool(of_train) and apart and not splits[held_out[0]] & TRAIN_WORDS, "data.path", path, valid)
    return {"train": of_train, "val": held_out}


def _shards_in(folder: Path, path: str) -> list[Path]:
    """Return the archives in a folder; a pipe among them is not waited for, nor left out without a word."""
    found = sorted(folder.glob("*.tar"))
    others = [str(shard) for shard in found if not shard.is_file()]
    valid = f"a folder whose .tar are all regular files: {len(others)} are not, as {others[0]}" if others else ""
    require(not others, "data.path", path, valid)
    return found


def _in_order(shard: Path) -> tuple[str, list[tuple[int, str]]]:
    """Return what sorts 9.tar before 10.tar."""
    parts = re.split(r"(\d+)", shard.name)
    return str(shard.parent), [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def expand(pattern: str) -> list[Path]:
    """Return the paths that a pattern stands for, in the order of their numbers.

    Raises:
        ConfigError: they are too many, or a range goes backwards.
    """
    parts, ranges = RANGE.split(pattern)[::3], RANGE.findall(pattern)
    many = 1
    for first, last in ranges:
        require(int(first) <= int(last), "data.path", pattern, f"ranges that go up: {{{first}..{last}}} does not")
        many *= int(last) - int(first) + 1
        require(many <= MAX_SHARDS, "data.path", pattern, f"at most {MAX_SHARDS} shards")
    numbers = ([f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)] for first, last in ranges)
    filled = itertools.product(*numbers)
    return [Path("".join(itertools.chain(*zip(parts, [*chosen, ""], strict=True)))) for chosen in filled]
