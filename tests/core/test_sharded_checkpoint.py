"""A checkpoint in pieces: what was saved comes back, what is damaged or forged is refused, and no code in it runs."""

import json
import os
import pickle
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import Metadata

from core.atomic_write import save as save_file
from core.checkpoint import load, load_beside_weights
from core.distributed_checkpoint import PiecesWriter
from core.sharded_checkpoint import META, VALUES, Piece, Saved, _check, damage, joined, name_of, read_index, split
from core.untrusted import Untrusted
from tests.support.archives import assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def state() -> dict[str, Any]:
    """Of a model in bf16 and its optimizer, with a tensor under two names."""
    linear = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    weights: dict[str, Any] = dict(linear.state_dict())
    by_name = dict(zip(weights, optimizer.state_dict()["state"].values(), strict=True))
    groups = [{**optimizer.state_dict()["param_groups"][0], "params": list(weights)}]
    return {
        "state_dict": {**weights, "tied": weights["weight"]},
        "optimizer_0": {"state": by_name, "param_groups": groups},
    }


def save(folder: Path, saved: dict[str, Any]) -> Path:
    """As a run does."""
    folder.mkdir()
    values, tensors = split(saved)
    save_file({"global_step": 7}, folder / META)
    save_file(values, folder / VALUES)
    named = {name_of(path): tensor for path, tensor in tensors.items()}
    dcp.save(named, storage_writer=PiecesWriter(folder, {name_of(path): path for path in tensors}), no_dist=True)
    return folder


def save_old(folder: Path, **entries: Any) -> Path:
    """As version 0.1 did."""
    dcp.save({**state(), **entries}, checkpoint_id=folder)
    torch.save({"global_step": 7}, folder / META)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "last.ckpt", state())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    saved = state()
    folder = save(tmp_path / "last.ckpt", saved)
    content = load(folder)
    assert content.pop("global_step") == load_beside_weights(folder)["global_step"] == 7
    assert_same(content, saved)
    assert content["optimizer_0"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert damage(folder, thorough=True) is None


def test_its_files_are_those_that_anybody_can_read(folder: Path) -> None:
    (folder.parent / "any").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder.parent / "any").stat().st_mode}
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.json", "index.crc32", "meta.pt", "values.pt", "rank-00000.safetensors"}
    with safe_open(folder / "rank-00000.safetensors", "pt") as file:
        assert file.get_tensor("state_dict.weight").dtype is torch.bfloat16
    assert json.loads((folder / "index.json").read_text())["tensors"]["state_dict.weight"]["shape"] == [2, 3]


def test_a_nested_state_is_taken_apart_and_put_together() -> None:
    nested = {
        "a": [1, torch.zeros(2), {"c": (), "b": torch.ones(1)}],
        "d": {},
        "e": torch.tensor(3),
        "f": {"g": (1, 2)},
    }
    values, tensors = split(nested)
    assert values == {"a": [1, None, {"c": ()}], "d": {}, "f": {"g": (1, 2)}}
    assert_same(dict(sorted(joined(values, tensors).items())), nested)


@pytest.mark.parametrize("name", ["index.json", "index.crc32", "meta.pt", "values.pt", "rank-00000.safetensors"])
def test_any_flipped_bit_is_found(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert damage(folder, thorough=True), place
    (folder / name).write_bytes(whole[:-1])
    assert damage(folder, thorough=False), "of a missing byte each process knows"
    (folder / name).unlink()
    assert damage(folder, thorough=False)


def forge(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Another index, with its own checksum."""
    index = json.loads((folder / "index.json").read_text())
    edited = edit(index)
    content = edited if isinstance(edited, bytes) else json.dumps(index if edited is None else edited).encode()
    (folder / "index.json").write_bytes(content)
    (folder / "index.crc32").write_text(f"{zlib.crc32(content)}\n")


def of_weight(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["tensors"]["state_dict.weight"].update(changed)


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a file elsewhere": (lambda i: i["files"].append(["../elsewhere", 1, 1]), r"lies outside of it: \.\./elsewhere"),
    "an absolute file": (lambda i: i["files"].append(["/etc/passwd", 1, 1]), "lies outside of it: /etc/passwd"),
    "a file that is a number": (lambda i: i["files"].append([3, 1, 1]), "lies outside of it: 3"),
    "a tensor of terabytes": (of_weight(shape=[1 << 40], pieces=[[0, [0], [1 << 40]]]), "larger than its files"),
    "a shape of floats": (of_weight(shape=[2.0, 3.0]), "a shape in its index is none"),
    "a negative shape": (of_weight(shape=[-2, -3]), "a shape in its index is none"),
    "a shape of 10^30": (of_weight(shape=[10**30]), "a shape in its index is none"),
    "many dimensions": (of_weight(shape=[1] * 99), "a shape in its index is none"),
    "a piece outside": (of_weight(pieces=[[0, [1, 0], [2, 3]]]), "lies outside of it"),
    "a gap": (of_weight(pieces=[[0, [0, 0], [1, 3]]]), "do not fill it"),
    "one piece twice, and a gap": (of_weight(pieces=[[0, [0, 0], [1, 3]], [0, [0, 0], [1, 3]]]), "do not fill it"),
    "an overlap and a gap": (
        of_weight(pieces=[[0, [0, 0], [1, 3]], [0, [0, 1], [2, 1]], [0, [1, 0], [1, 1]]]),
        "not fill",
    ),
    "too many values": (lambda i: b"[" + b"[]," * (8 << 20) + b"0]", "more than 536,870,912 bytes of memory"),
    "no piece": (of_weight(pieces=[]), "do not fill it"),
    "a piece of other dimensions": (of_weight(pieces=[[0, [0], [6]]]), "has other dimensions"),
    "a file that is not listed": (of_weight(pieces=[[9, [0, 0], [2, 3]]]), "cannot be read"),
    "another type": (of_weight(dtype="float32"), "is not what the index says"),
    "no type": (of_weight(dtype="__class__"), "cannot be read"),
    "another shape": (of_weight(shape=[3, 2], pieces=[[0, [0, 0], [3, 2]]]), "is not what the index says"),
    "a path through a tensor": (of_weight(path=["state_dict", "bias", "x"]), "a path in its index is none"),
    "a path of objects": (of_weight(path=[{}, []]), "a path in its index is none"),
    "another version": (lambda i: i.update(version=2), "of another version"),
    "no index": (lambda i: [], "cannot be read"),
    "depth": (lambda i: b"[" * 5000, "more than 200 levels deep"),
    "length": (lambda i: b" " * (33 << 20), "more than 33,554,432 bytes"),
    "a long number": (lambda i: b'{"format": ' + b"9" * 5000 + b"}", "cannot be read"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_is_refused(folder: Path, name: str) -> None:
    edit, reason = FORGED[name]
    forge(folder, edit)
    with pytest.raises(Untrusted, match=reason):
        load(folder)


def covers(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether each entry lies in just one of the boxes, counted one by one."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in boxes:
        counts[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    return bool((counts == 1).all())


def accepted(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    pieces = tuple(Piece("x", offsets, sizes) for offsets, sizes in boxes)
    try:
        _check("weight", Saved(("weight",), torch.float32, shape, pieces))
    except Untrusted:
        return False
    return True


def test_pieces_are_accepted_where_they_fill_a_tensor_and_nowhere_else() -> None:
    """Against a count of each entry, of boxes cut by chance, and the same with one of them moved or doubled."""
    random = Random(0)
    wrong = 0
    for _ in range(300):
        shape = tuple(random.randint(1, 6) for _ in range(random.randint(1, 3)))
        boxes = [((0,) * len(shape), shape)]
        for _ in range(random.randint(0, 5)):
            offsets, sizes = boxes.pop(random.randrange(len(boxes)))
            n = random.randrange(len(shape))
            at = random.randint(0, sizes[n])
            left, right = list(sizes), list(sizes)
            left[n], right[n] = at, sizes[n] - at
            second = [*offsets]
            second[n] += at
            boxes += [(offsets, tuple(left)), (tuple(second), tuple(right))]
        random.shuffle(boxes)
        assert covers(shape, boxes)
        assert accepted(shape, boxes)
        offsets, sizes = boxes[0]
        moved = tuple(random.randint(0, whole - size) for whole, size in zip(shape, sizes, strict=True))
        changed = [(moved, sizes), *boxes[1:]]
        assert accepted(shape, changed) == covers(shape, changed)
        wrong += not covers(shape, changed)
    assert wrong > 50


def test_many_pieces_are_looked_at_in_little_time() -> None:
    begun = time.process_time()
    rows = [((n, 0), (1, 4)) for n in range(100_000)]
    assert accepted((100_000, 4), rows)
    steps = [((0, n), (100_000 - n, 1)) for n in range(1000)]
    assert not accepted((100_000, 1000), [*steps, *steps])
    assert time.process_time() - begun < 10


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "rank-00000.safetensors").rename(folder.parent / "x")
    (folder / "rank-00000.safetensors").symlink_to(folder.parent / "x")
    assert "is a link" in str(damage(folder, thorough=False))


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "meta.pt", "index.json"])
def test_a_link_in_a_circle_is_said(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    assert damage(folder, thorough=False)
    with pytest.raises((Untrusted, OSError)):
        load(folder)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    (folder / "meta.pt").unlink()
    os.mkfifo(folder / "meta.pt")
    assert "no regular file" in str(damage(folder, thorough=True))
    with pytest.raises(Untrusted, match="no regular file"):
        load(folder)


def test_what_torch_wrote_is_loaded(tmp_path: Path) -> None:
    folder = save_old(tmp_path / "last.ckpt")
    content = load(folder)
    assert content["global_step"] == load_beside_weights(folder)["global_step"] == 7
    assert content["state_dict"]["weight"].shape == (2, 3)
    assert content["optimizer_0"]["param_groups"][0]["lr"] == 1e-3
    assert damage(folder, thorough=True) is None
    assert read_index(folder).old


def test_of_torchs_pieces_one_that_is_damaged_is_found(tmp_path: Path) -> None:
    folder = save_old(tmp_path / "last.ckpt")
    piece = folder / "__0_0.distcp"
    whole = piece.read_bytes()
    for place in range(0, len(whole), 397):
        piece.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        if not damage(folder, thorough=True):
            piece.write_bytes(whole)
            expected = load(folder)
            piece.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            assert_same(load(folder), expected)


def test_code_in_an_entry_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder = save_old(tmp_path / "last.ckpt", extra=Payload(tmp_path / "ran"))
    with pytest.raises(Untrusted, match=r"it names \w+\.mkdir, which no checkpoint needs"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    dcp.load({"extra": None}, checkpoint_id=folder)
    assert (tmp_path / "ran").exists(), "torch alone would have run it"


@pytest.mark.parametrize("read", [load, load_beside_weights])
def test_code_in_the_metadata_is_refused_and_does_not_run(tmp_path: Path, read: Any) -> None:
    folder = save_old(tmp_path / "last.ckpt")
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(Untrusted, match=r"it names \w+\.mkdir, which no checkpoint needs"):
        read(folder)
    assert not (tmp_path / "ran").exists()


def longer(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).length = 1 << 40


def elsewhere(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"


def everywhere(metadata: Metadata) -> None:
    for piece in metadata.storage_data.values():
        piece.offset, piece.length = 0, (1 << 13)


def larger(metadata: Metadata) -> None:
    weight = metadata.state_dict_metadata["state_dict.weight"]
    weight.size = weight.chunks[0].sizes = torch.Size([1 << 20, 1 << 20])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (longer, "is too short"),
        (elsewhere, r"a piece lies outside of it: \.\./elsewhere"),
        (everywhere, "lie one in the other"),
        (larger, "larger than its files"),
    ],
)
def test_forged_metadata_are_refused(tmp_path: Path, edit: Callable[[Metadata], None], reason: str) -> None:
    folder = save_old(tmp_path / "last.ckpt")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(Untrusted, match=reason):
        load(folder)
