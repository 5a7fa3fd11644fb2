"""Bounds on sizes: what is beyond one is refused at once, in a line that names the bound and how to raise it."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from core import memory
from core.errors import ConfigError, UserError
from core.limits import VARIABLE, require_at_most
from core.memory import LACK, check_memory, explain_lack, memory_of_machine
from core.parallel import num_passes
from datamodules.synthetic import Synthetic
from lightning_modules.config import ModelConfig
from tests.support.runs import tiny_job, train

BEYOND = [
    "model.num_layers=10000000",
    "model.dim=1000000000",
    "model.ffn_dim=1000000000000000000",
    "model.moe.num_experts=10000000",
    "model.moe.num_shared_experts=10000000",
    "model.moe.expert_dim=1000000000",
    "data.seq_len=1000000000",
    "data.batch_size=1000000000",
    "data.num_workers=1000000",
    "data.batch_size=1048576",  # of 256 positions it would be the most
    "trainer.max_steps=1000000000000000000000",
    "trainer.accumulate_grad_batches=1000000000000",
]


@pytest.mark.parametrize("override", BEYOND)
def test_beyond_a_bound_it_is_refused_at_once(override: str, tmp_path: Path) -> None:
    begun = time.process_time()
    finished = train(tmp_path, *tiny_job("trainer.val_check_interval=1", "data.seq_len=512", override))
    field, _, value = override.partition("=")
    assert finished.code == 2
    assert finished.err.startswith(f"Error: {field}={value} is not valid: expected at most ")
    assert f"{VARIABLE}=10 in the environment makes the bounds on sizes ten times as large\n" in finished.err
    assert time.process_time() - begun < 30
    assert list(tmp_path.iterdir()) == []


def test_the_environment_raises_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected at most 4,096;"):
        ModelConfig(num_layers=4097)
    monkeypatch.setenv(VARIABLE, "10")
    assert ModelConfig(num_layers=4097).num_layers == 4097
    with pytest.raises(ConfigError, match="expected at most 40,960;"):
        ModelConfig(num_layers=40_961)


@pytest.mark.parametrize("task", ["copy", "induction"])
def test_a_vocabulary_of_any_size_is_not_drawn_from(task: str) -> None:
    """The keys of a sequence are a permutation of half of it; a run from elsewhere may name any."""
    with pytest.raises(ConfigError, match=r"data\.vocab_size=1000000000000 is not valid: expected at most 16,777,217;"):
        Synthetic(task, vocab_size=10**12, seq_len=7 if task == "induction" else 8, batch_size=1)


@pytest.mark.parametrize("factor", ["0", "-1", "nan", "inf", "x", "1e10", "0.5"])
def test_only_a_number_of_at_least_one_raises_it(factor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, factor)
    with pytest.raises(UserError, match=f"{VARIABLE}='{factor}' is not valid: expected a number from 1 to 1e9"):
        require_at_most(10, "field", 5)


def test_the_passes_of_a_large_batch_are_found_without_counting_to_it() -> None:
    begun = time.process_time()
    assert num_passes(1, 1, 10**12, 10**6) == 10**6
    with pytest.raises(
        ConfigError, match="micro_batch_size=7 is not valid: expected null, or a divisor of 1000000000000"
    ):
        num_passes(1, 1, 10**12, 7)
    assert time.process_time() - begun < 1


def test_more_processes_than_sequences_are_the_processes_fault() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.devices=1000 is not valid: expected at most 8 data-parallel"):
        num_passes(1000, 1, 8, None)


def test_a_model_that_the_machine_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_of_machine", lambda: 1000)
    finished = train(tmp_path, *tiny_job())
    assert finished.code == 2
    assert finished.err.startswith("Error: model.dim=32 is not valid: ")
    assert "parameters with gradients and optimizer state take" in finished.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "held", "fits"), [("32-true", 15, 0), ("32-true", 16, 1), ("bf16-true", 8, 1)])
def test_sixteen_bytes_a_parameter_or_eight(
    precision: str, held: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_of_machine", lambda: held * 1000)
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, world_size=1, precision=precision)
    module: Any = SimpleNamespace(num_parameters=(1000, 1000), model_config=SimpleNamespace(dim=8))
    if fits:
        check_memory(trainer, module)
    else:
        with pytest.raises(ConfigError, match=r"1,000 parameters .* take"):
            check_memory(trainer, module)


def test_the_machine_says_what_it_has() -> None:
    held = memory_of_machine()
    assert held is not None
    assert held > 1 << 28


def test_a_lack_of_memory_is_said_in_one_line() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 58, dtype=torch.uint8)
    lack = explain_lack(error.value)
    assert lack is not None
    assert str(lack).startswith("The memory is not enough (")
    assert "\n" not in str(lack)
    assert "288230376151711744" in str(lack)
    assert explain_lack(RuntimeError("a fault")) is None
    assert explain_lack(MemoryError()) is not None


class OutOfMemory(L.Callback):
    def on_before_backward(self, *_: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory"
        )


def test_a_device_without_memory_ends_a_run_in_a_line(tmp_path: Path) -> None:
    """Which a study knows as no result: tests/studies/test_devices.py."""
    given = [*tiny_job("run_dir=run"), f"+callbacks.full._target_={__name__}.OutOfMemory"]
    finished = train(tmp_path, *given)
    assert finished.code == 2
    said = finished.err[finished.err.index("Error:") :]
    assert said.startswith(f"Error: {LACK} (CUDA out of memory. Tried to allocate 2.00 GiB.); data.batch_size, ")
    assert said.count("\n") == 1
