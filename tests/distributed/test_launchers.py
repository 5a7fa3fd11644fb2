"""torchrun, and no launcher at all: real commands, whose processes find each other by themselves."""

import signal
from pathlib import Path

import pytest

from tests.support.forked import python
from tests.support.processes import together, under_torchrun
from tests.support.runs import TRAIN, assert_began, run, scalars, tiny_job
from tools.plan import compose_config

STEPS = ["experiment=dense_spannorm", "optim.schedule=constant", "trainer.max_steps=4"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "run_dir=run"]
TERMINATED = 128 + signal.SIGTERM


def fault(name: str) -> str:
    return f"+callbacks.fault={{_target_: tests.support.rank_faults.{name}, signum: {int(signal.SIGTERM)}, step: 2}}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of one process."""
    return scalars(run(tmp_path_factory.mktemp("alone"), "run", *STEPS), "train/loss")


def assert_same(folder: Path, alone: dict[int, float]) -> None:
    assert len(alone) == 4
    assert scalars(folder, "train/loss") == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_torchrun_says_how_many_there_are(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    composed = compose_config([f"trainer={trainer}"]).trainer
    assert (composed.devices, composed.num_nodes) == (4, 3)


def test_with_its_variables_two_processes_have_the_curve_of_one(tmp_path: Path, alone: dict[int, float]) -> None:
    (first,), (second,) = together(2, tmp_path, under_torchrun, [tiny_job(*STEPS, *DDP)])
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (first.out.count("Run folder: run"), second.out) == (1, "")
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_torchrun_has_the_curve_of_one_process(tmp_path: Path, alone: dict[int, float]) -> None:
    finished = python(tmp_path, *TORCHRUN, str(TRAIN), *tiny_job(*STEPS, *DDP))
    assert finished.code == 0, finished.err
    assert finished.out.count("Run folder: run") == 1
    assert_same(tmp_path / "run", alone)


def test_without_a_launcher_all_save_when_their_group_is_terminated(tmp_path: Path, alone: dict[int, float]) -> None:
    arguments = [str(TRAIN), *tiny_job(*STEPS, *DDP, "trainer.devices=2", fault("SignalGroup"))]
    finished = python(tmp_path, *arguments)
    assert finished.code == TERMINATED, finished.err
    assert "Interrupted: SIGTERM after step 2. Saved; go on with" in finished.out
    run(tmp_path, "run", *STEPS, "ckpt_path=last")
    assert_began(tmp_path / "run", 2)
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_ctrl_c_before_the_first_step_ends_all_at_once(tmp_path: Path) -> None:
    early = "+callbacks.early._target_=tests.support.rank_faults.InterruptEarly"
    finished = python(tmp_path, str(TRAIN), *tiny_job(*STEPS, *DDP, "trainer.devices=2", early))
    assert finished.code == 128 + signal.SIGINT, finished.err
    assert "Interrupted at once; there was nothing to save." in finished.out
    assert "Traceback" not in finished.err


@pytest.mark.slow
def test_when_torchrun_is_terminated_all_save(tmp_path: Path, alone: dict[int, float]) -> None:
    finished = python(tmp_path, *TORCHRUN, str(TRAIN), *tiny_job(*STEPS, *DDP, fault("SignalLauncher")))
    assert finished.code, "torchrun's own"
    assert "Interrupted: SIGTERM after step 2. Saved; go on with" in finished.out
    run(tmp_path, "run", *STEPS, "ckpt_path=last")
    assert_began(tmp_path / "run", 2)
    assert_same(tmp_path / "run", alone)
