"""Which saved snapshots a resumed run takes for its own; test_recovery.py resumes real runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from callbacks.checkpointing.last_checkpoint import LastCheckpoint
from callbacks.divergence.detectors import Detectors
from callbacks.divergence.policies.snapshot import Snapshot
from callbacks.divergence.policies.snapshot_file import SnapshotFile
from tests.conftest import make_module


def detectors(*losses: float) -> Detectors:
    made = Detectors(7.0, 8.0, 6.0)
    for loss in losses:
        made.update(loss, 1.0)
    return made


def trainer(folder: Path, rank: int = 0, other_rank: int = 1, **changed: Any) -> Any:
    """Of two processes, at step 7; the other one has (1) or lacks (0) its file."""
    least = lambda mine, reduce_op: torch.minimum(mine, torch.tensor(other_rank))  # noqa: E731
    strategy = SimpleNamespace(root_device="cpu", reduce=least, barrier=lambda name: None)
    facts = {"global_step": 7, "world_size": 2, "ckpt_path": folder / "last.ckpt", **changed}
    ranks = {"global_rank": rank, "local_rank": rank, "is_global_zero": rank == 0}
    return SimpleNamespace(callbacks=[], loggers=[], strategy=strategy, **ranks, **facts)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """Saved by rank 0."""
    module = make_module()
    optimizer = AdamW(module.parameters(), lr=0.1)
    module(torch.zeros(1, 4, dtype=torch.long))[0].sum().backward()
    optimizer.step()
    made = Snapshot(5, module, optimizer, detectors(2.0).state_dict())
    made.restored_at = 6
    watched, callback = trainer(tmp_path), LastCheckpoint(str(tmp_path), 1)
    watched.callbacks, watched.save_checkpoint = [callback], lambda path: None
    SnapshotFile(watched, detectors(2.0, 3.0), lambda: [made])
    callback.save_before_leaving(watched)
    return made


def load(changed: Any, losses: tuple[float, ...] = (2.0, 3.0)) -> list[Snapshot]:
    history = detectors(*losses)
    return SnapshotFile(changed, history, list).load(history.state_dict())


def test_what_was_saved_comes_back(tmp_path: Path, snapshot: Snapshot) -> None:
    assert [path.name for path in (tmp_path / "step_7").iterdir()] == ["snapshots-rank-0.pt"]
    (found,) = load(trainer(tmp_path))
    torch.testing.assert_close(vars(found), vars(snapshot), rtol=0, atol=0)
    assert found.restored_at == 6


@pytest.mark.parametrize("snapshots", [[{"restore": 1}], [7], 7, [{}]])
def test_what_is_no_snapshot_is_left_out(tmp_path: Path, snapshot: Snapshot, snapshots: Any) -> None:
    path = tmp_path / "step_7/snapshots-rank-0.pt"
    torch.save({**torch.load(path), "snapshots": snapshots}, path)
    assert load(trainer(tmp_path)) == []


def test_what_belongs_to_another_checkpoint_does_not(tmp_path: Path, snapshot: Snapshot) -> None:
    assert load(trainer(tmp_path, global_step=8)) == []
    assert load(trainer(tmp_path, world_size=1)) == []
    assert load(trainer(tmp_path), (2.0, 3.1)) == [], "another run"
    assert load(trainer(tmp_path, rank=1)) == [], "it has no file"
    assert load(trainer(tmp_path, other_rank=0)) == [], "the other one has none"
    assert load(trainer(tmp_path, ckpt_path=None)) == [], "nothing is resumed"
