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
from tests.support.models import make_module


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


def take_snapshot(step: int) -> Snapshot:
    module = make_module()
    optimizer = AdamW(module.parameters(), lr=0.1)
    module(torch.zeros(1, 4, dtype=torch.long))[0].sum().backward()
    optimizer.step()
    return Snapshot(step, module, optimizer, detectors(2.0).state_dict(), {"0.n_averaged": torch.tensor(step)})


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """Saved by rank 0."""
    made = take_snapshot(5)
    made.restored_at = 6
    watched, callback = trainer(tmp_path), LastCheckpoint(str(tmp_path), 1)
    watched.callbacks, watched.save_checkpoint = [callback], lambda path: None
    SnapshotFile(watched, detectors(2.0, 3.0), lambda: [made])
    callback.save_before_leaving(watched)
    return made


def load(changed: Any, losses: tuple[float, ...] = (2.0, 3.0)) -> list[Snapshot]:
    history = detectors(*losses)
    return SnapshotFile(changed, history, list).load(history.state_dict(), take_snapshot(7))


def test_what_was_saved_comes_back(tmp_path: Path, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]) -> None:
    assert [path.name for path in (tmp_path / "step_7").iterdir()] == ["snapshots-rank-0.pt"]
    (found,) = load(trainer(tmp_path))
    torch.testing.assert_close(vars(found), vars(snapshot), rtol=0, atol=0)
    assert found.restored_at == 6
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("snapshots", [[{"restore": 1}], [7], 7, [{}], None])
def test_what_is_no_snapshot_is_left_out(
    tmp_path: Path, snapshot: Snapshot, snapshots: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step_7/snapshots-rank-0.pt"
    torch.save({**torch.load(path), "snapshots": snapshots}, path)
    assert load(trainer(tmp_path)) == []
    assert "snapshots-rank-0.pt is passed over, and the run starts without snapshots: it " in capsys.readouterr().err


INNER: dict[str, tuple[list[str], Any]] = {  # where, and what: a function of what is there
    "a weight of another shape": (["_weights", "*"], lambda x: torch.zeros(1)),
    "a weight that would be broadcast": (["_weights", "*"], lambda x: x[..., :1].clone()),
    "a weight of another type": (["_weights", "*"], lambda x: x.double()),
    "a text for a weight": (["_weights", "*"], lambda x: "x"),
    "no weights": (["_weights"], lambda x: {}),
    "a list of weights": (["_weights"], lambda x: list(x.values())),
    "a parameter that is none": (["_optimizer"], lambda x: {**x, "nothing": {}}),
    "a moment of another shape": (["_optimizer", "*", "exp_avg"], lambda x: torch.zeros(1)),
    "two steps": (["_optimizer", "*", "step"], lambda x: torch.zeros(2)),
    "a state that AdamW does not keep": (["_optimizer", "*"], lambda x: {**x, "more": 1}),
    "a state that lacks one": (["_optimizer", "*"], lambda x: {"step": x["step"]}),
    "a number for a state": (["_optimizer", "*"], lambda x: 1),
    "an average of another shape": (["_averages", "*"], lambda x: torch.zeros(1)),
    "no averages": (["_averages"], lambda x: {}),
    "random numbers of another size": (["_random"], lambda x: x[:-1].clone()),
    "random numbers that are floats": (["_random"], lambda x: x.float()),
    "random numbers of a device": (["_cuda_random"], lambda x: "x"),
    "a history of texts": (["detectors", "loss", "values"], lambda x: ["x"]),
    "a history of tensors": (["detectors", "loss", "values"], lambda x: [torch.zeros(2)]),
    "a history that is none": (["detectors", "climb", "best"], lambda x: "x"),
    "no history": (["detectors"], lambda x: {}),
    "a step to come": (["step"], lambda x: 8),
    "a step below zero": (["step"], lambda x: -1),
    "a step that is true": (["step"], lambda x: True),
    "a restoration that is none": (["restored_at"], lambda x: "x"),
}


@pytest.mark.parametrize("what", INNER)
def test_a_snapshot_that_cannot_be_restored_is_left_out(
    tmp_path: Path, snapshot: Snapshot, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it can is seen when it is read, not when the run is in trouble."""
    path = tmp_path / "step_7/snapshots-rank-0.pt"
    content = torch.load(path)
    (*names, last), change = INNER[what]
    node = content["snapshots"][0]
    for name in names:
        node = node[next(iter(node)) if name == "*" else name]
    last = next(iter(node)) if last == "*" else last
    node[last] = change(node[last])
    torch.save(content, path)
    assert load(trainer(tmp_path)) == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "is passed over, and the run starts without snapshots: its " in said


@pytest.mark.parametrize("loss", [torch.zeros(3), torch.zeros(1), "x"])
def test_a_history_that_is_none_belongs_to_no_checkpoint(tmp_path: Path, snapshot: Snapshot, loss: Any) -> None:
    path = tmp_path / "step_7/snapshots-rank-0.pt"
    content = torch.load(path)
    content["detectors"]["loss"]["values"][0] = loss
    torch.save(content, path)
    assert load(trainer(tmp_path)) == []


def test_a_parameter_that_had_not_stepped_yet_may_be_missing(tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "step_7/snapshots-rank-0.pt"
    content = torch.load(path)
    content["snapshots"][0]["_optimizer"].popitem()
    torch.save(content, path)
    assert len(load(trainer(tmp_path))) == 1


def test_an_older_one_without_averages_serves_a_run_that_has_none(tmp_path: Path, snapshot: Snapshot) -> None:
    state = snapshot.state_dict()
    del state["_averages"]
    without = take_snapshot(7)
    without._averages = {}
    assert Snapshot.from_state_dict(state, without).step == 5
    with pytest.raises(ValueError, match="its averages has other parts"):
        Snapshot.from_state_dict(state, take_snapshot(7))


def test_what_belongs_to_another_checkpoint_does_not(tmp_path: Path, snapshot: Snapshot) -> None:
    assert load(trainer(tmp_path, global_step=8)) == []
    assert load(trainer(tmp_path, world_size=1)) == []
    assert load(trainer(tmp_path), (2.0, 3.1)) == [], "another run"
    assert load(trainer(tmp_path, rank=1)) == [], "it has no file"
    assert load(trainer(tmp_path, other_rank=0)) == [], "the other one has none"
    assert load(trainer(tmp_path, ckpt_path=None)) == [], "nothing is resumed"
