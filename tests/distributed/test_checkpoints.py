"""What two processes saved goes on in one, in two of DDP, and in four."""

from pathlib import Path

import pytest
import torch

from tests.support.distributed_runs import Run, train
from tests.support.processes import command_line, together
from tests.support.runs import tiny_job

SAVED_AT, STEPS = 8, 14
SAVED = [
    Run("fsdp", "dense", "siamesenorm", 2, steps=STEPS, save_at=SAVED_AT, save="fsdp"),
    Run("ep", "moe", "spannorm", 2, steps=STEPS, save_at=SAVED_AT, save="ep"),
]
CUT = [Run("tp", "dense", "prenorm", 2, steps=STEPS, save_at=SAVED_AT, save="tp")]


def going_on(runs: list[Run], strategy: str, num_processes: int) -> list[Run]:
    """The same from their checkpoints, by another strategy."""
    return [
        run._replace(strategy=strategy, num_processes=num_processes, steps=STEPS, load=run.save, save=None)
        for run in runs
    ]


def losses(curve: list[dict[str, float]]) -> list[float]:
    return [metrics["train/loss"] for metrics in curve]


def assert_goes_on(folder: Path, run: Run, curve: list[dict[str, float]]) -> None:
    """As one process would have, had it never stopped."""
    whole = train(folder, run._replace(strategy="one", num_processes=1, load=None))
    assert len(curve) == STEPS - SAVED_AT
    assert losses(curve) == pytest.approx(losses(whole)[SAVED_AT:], rel=1e-5), run


@pytest.mark.slow
def test_a_checkpoint_of_two_goes_on_in_one_and_in_four(tmp_path: Path) -> None:
    together(2, tmp_path, train, SAVED)
    cases = going_on(SAVED, "fsdp", 4)
    four, *_ = together(4, tmp_path, train, cases)
    for run, curve in zip(cases, four, strict=True):
        assert_goes_on(tmp_path, run, curve)
        assert_goes_on(tmp_path, run, train(tmp_path, run._replace(strategy="one", num_processes=1)))


@pytest.mark.slow
def test_it_goes_on_in_ddp_and_cut_another_way(tmp_path: Path) -> None:
    together(2, tmp_path, train, SAVED + CUT)
    cases = [*going_on(SAVED + CUT, "ddp", 2), *going_on(SAVED, "tp", 2), *going_on(CUT, "fsdp", 2)]
    found, _ = together(2, tmp_path, train, cases)
    for run, curve in zip(cases, found, strict=True):
        assert_goes_on(tmp_path, run, curve)


@pytest.mark.slow
def test_those_who_cut_one_model_draw_the_same_numbers_after_two_shared_the_data(tmp_path: Path) -> None:
    own, noted = (f"+callbacks.{n}._target_=tests.support.rank_faults.{n}" for n in ("OwnNumbers", "NoteNumbers"))
    base = ["experiment=moe_spannorm", "model.moe.jitter=0.1", "trainer=fsdp", "run_dir=run", noted]
    together(2, tmp_path, command_line, [tiny_job(*base, own, "trainer.devices=2")])
    cut = ["trainer.devices=4", "trainer.strategy.tensor_parallel_size=2", "trainer.max_steps=4", "ckpt_path=last"]
    for ((finished,),) in zip(together(4, tmp_path, command_line, [tiny_job(*base, *cut)]), strict=True):
        assert finished.code == 0, finished.err
    first, same, second, likewise = (torch.load(tmp_path / f"numbers-{rank}-of-4") for rank in range(4))
    assert torch.equal(first, same)
    assert torch.equal(second, likewise)
    assert not torch.equal(first, second), "as the two had them"
