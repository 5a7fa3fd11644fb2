"""Processes write and read a checkpoint in pieces together, by the plans of torch.distributed.checkpoint.

Of that, only what decides who writes and reads which box of which tensor: its own files are pickles.
"""

import dataclasses
import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from core.atomic_write import save_tensors, sync
from core.sharded_checkpoint import META, VALUES, Path_, Piece, Pieces, Saved, checksum_of, key_of, name_of, write_index
from core.untrusted import Untrusted


class PiecesWriter(StorageWriter, BlockingAsyncStager):
    """Writes a folder of core/sharded_checkpoint.py; the first process has written `meta.pt` and `values.pt` before.

    Args:
        folder: which is there.
        paths: of every tensor, by its name.
    """

    def __init__(self, folder: Path, paths: Mapping[str, Path_]) -> None:
        BlockingAsyncStager.__init__(self)
        self.folder, self.paths = folder, paths

    def reset(self, checkpoint_id: Any = None) -> None:
        """Forget nothing: nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *arguments: Any, **options: Any) -> None:
        """Set up nothing: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return what torch has planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave each process' plan as it is: each writes a file of its own."""
        return [
            dataclasses.replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Write this process' file, with what torch has planned for it.

        Raises:
            OSError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        storages: set[int] = set()
        for item in plan.items:
            box = item.tensor_data
            assert box is not None, f"{item.index.fqn} is no tensor"
            offsets, whole = tuple(box.chunk.offsets), box.chunk.sizes == box.size
            tensor = planner.resolve_data(item).detach().cpu().contiguous()  # type: ignore[union-attr]
            if (storage := tensor.untyped_storage().data_ptr()) in storages:
                tensor = tensor.clone()  # of two names of one tensor, which a file of safetensors does not have
            storages.add(storage)
            tensors[key_of(item.index.fqn, offsets, whole)] = tensor
        file: tuple[str, int, int] | None = None
        if tensors:
            path = self.folder / str(plan.storage_data)
            with _system_errors():
                save_tensors(tensors, path)
            sync(path)
            file = path.name, path.stat().st_size, checksum_of(path)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(item.index, 0, file) for item in plan.items])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; by the first process, when all others are done."""
        written = [result for of_one in results for result in of_one]
        files = {name: (size, checksum) for name, size, checksum in {result.storage_data for result in written}}
        files = dict(sorted(files.items()))
        for name in (META, VALUES):
            sync(self.folder / name)
            files[name] = (self.folder / name).stat().st_size, checksum_of(self.folder / name)
        where = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data[0] for r in written}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
            pieces = [
                Piece(where[name, offsets] if (name, offsets) in where else where[name, ()], offsets, sizes)
                for offsets, sizes in boxes
            ]
            tensors[name] = Saved(self.paths[name], tensor.properties.dtype, tuple(tensor.size), tuple(pieces))
        write_index(self.folder, tensors, files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept any name of a folder."""
        return True


class PiecesReader(StorageReader):
    """Reads such a folder, in any number of processes.

    Args:
        pieces: its index, of which torch's plans are made.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces

    def reset(self, checkpoint_id: Any = None) -> None:
        """Forget nothing: nothing is kept."""

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        """Return the index, as torch plans with it."""
        described: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=saved.dtype),
                torch.Size(saved.shape),
                [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in saved.pieces],
            )
            for name, saved in self.pieces.tensors.items()
        }
        return Metadata(described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *arguments: Any, **options: Any) -> None:
        """Set up nothing: all is known by now."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return what torch has planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return what torch has planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Fill this process' tensors.

        Raises:
            Untrusted: what lies in a file is not what the index says.
        """
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise Untrusted(f"{item.storage_index.fqn} is no tensor")
            piece = self._piece(item.storage_index)
            box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            # The whole of a piece is mapped, and of that only the box is read.
            target.copy_(self.pieces.read(item.storage_index.fqn, piece)[box])
            planner.commit_tensor(item, target)
        read: Future[None] = Future()
        read.set_result(None)
        return read

    def _piece(self, index: MetadataIndex) -> Piece:
        pieces = self.pieces.tensors[index.fqn].pieces
        offsets = tuple(index.offset) if index.offset is not None else pieces[0].offsets
        if index.index is not None and index.index < len(pieces) and pieces[index.index].offsets == offsets:
            return pieces[index.index]
        return next(piece for piece in pieces if piece.offsets == offsets)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept any name of a folder."""
        return True


def fill(tensors: Mapping[Path_, Tensor], pieces: Pieces) -> None:
    """Load tensors in place, by all processes together, each what it holds of them.

    Raises:
        Untrusted: one of them is not among the pieces, or of another shape or kind: in all processes alike.
    """
    named: dict[str, Any] = {name_of(path): tensor for path, tensor in tensors.items()}
    for name, tensor in named.items():
        saved = pieces.tensors.get(name)
        if saved is None:
            raise Untrusted(f"it has no {name}")
        if saved.shape != tuple(tensor.shape):
            raise Untrusted(f"its {name} has the shape {list(saved.shape)}, not {list(tensor.shape)}")
        if saved.dtype.is_floating_point != tensor.is_floating_point():
            raise Untrusted(f"its {name} is of {saved.dtype}, not {tensor.dtype}")
    dcp.load(named, storage_reader=PiecesReader(pieces))


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raise what the system refuses as its own error, which safetensors has put into words."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error
