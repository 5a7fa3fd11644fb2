"""Tokens or images a second: of training steps, without validation, over all ranks; and what else is timed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler

from callbacks.monitors.throughput import DataWait, Throughput
from core.errors import ConfigError
from core.task import Task
from lightning_modules.transformer import Transformer
from lightning_modules.trunk import Count
from tests.support.job import ACCUMULATE, STEPS, Job
from tests.support.models import tiny_config
from tests.support.runs import scalars

FLOPS_PER_TOKEN = 1e6


class Module:
    def __init__(self, counted: str) -> None:
        self.task = Task("", counted, "")
        self.logged: list[dict[str, float]] = []
        self.model = SimpleNamespace(
            flops_per_token=lambda seq_len: FLOPS_PER_TOKEN * seq_len / 32,
            count=lambda batch: Count(4, 32, 4 * 32 if counted == "tokens" else 4),  # on each of two ranks
        )

    def log(self, name: str, value: float) -> None:
        self.logged.append({name: value})


class Trainer:
    world_size, accumulate_grad_batches, log_every_n_steps, max_steps, global_step = 2, 2, 2, 100, 0
    is_global_zero, precision, is_last_batch = True, "32-true", False

    def __init__(self) -> None:
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=dict)
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.callbacks: list[object] = []
        self.profiler = PassThroughProfiler()
        self.written: list[dict[str, float]] = []
        self.loggers = [SimpleNamespace(log_metrics=lambda values, step: self.written.append(values))]


@pytest.fixture(params=["tokens", "images"])
def timed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Throughput, Trainer, Module]:
    """Four steps of 2 batches, 1 s a batch but 3 s in the last two steps, of which half a second is waiting for data;
    50 s of validation in between, and 7 s of waiting after it."""
    now = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    throughput, trainer, module = Throughput(peak_flops=1e9), Trainer(), Module(request.param)
    batch = {"tokens": torch.zeros(4, 33, dtype=torch.int64)}
    arguments: tuple[Any, ...] = (trainer, module)

    def fetch(seconds: float) -> None:
        with trainer.profiler.profile("[_TrainingEpochLoop].train_dataloader_next"):
            now[0] += seconds

    throughput.on_train_start(*arguments)
    fetch(7.0)
    for index in range(8):
        throughput.on_train_batch_start(*arguments, batch, index)
        now[0] += 0.5 if index < 4 else 2.5
        fetch(0.5)
        trainer.global_step = (index + 1) // 2
        throughput.on_train_batch_end(*arguments, None, batch, index)
        if index == 3:
            throughput.on_validation_start(*arguments)
            now[0] += 50.0
            fetch(7.0)
    return throughput, trainer, module


def test_validation_does_not_count_and_windows_do_not_overlap(timed: tuple[Throughput, Trainer, Module]) -> None:
    throughput, trainer, module = timed
    counted = module.task.counted
    units = {"tokens": 4 * 32, "images": 4}[counted] * 2
    rate = f"train/{counted}_per_second"
    assert [entry[rate] for entry in module.logged if rate in entry] == pytest.approx([units / 1.0, units / 3.0])
    assert [values[f"train/{counted}"] for values in trainer.written] == [4 * units, 8 * units]
    assert throughput.units_per_second == pytest.approx(8 * units / 16.0)


def test_what_else_is_timed(timed: tuple[Throughput, Trainer, Module]) -> None:
    first, second = timed[1].written
    rate = 4 * 32 * 2 * FLOPS_PER_TOKEN / (2 * 1e9)
    assert (first["train/mfu"], second["train/mfu"]) == pytest.approx((rate / 1.0, rate / 3.0))
    assert (first["train/data_wait_share"], second["train/data_wait_share"]) == pytest.approx((0.5, 0.5 / 3))
    assert first["train/step_seconds_p50"] == first["train/step_seconds_p95"] == pytest.approx(2.0)
    for q in (50, 95):
        assert second[f"train/step_seconds_p{q}"] == pytest.approx(np.percentile([2.0, 2.0, 6.0, 6.0], q))


def test_of_a_real_run(job: Job) -> None:
    """No peak is known of a CPU, and this process has needed more than 50 MiB."""
    medians, shares = (scalars(job.folder, f"train/{key}") for key in ("step_seconds_p50", "data_wait_share"))
    assert len(medians) == len(shares) == STEPS
    assert all(0 < share < 1 for share in shares.values())
    rates = scalars(job.folder, "train/tokens_per_second")
    assert all(0 < ACCUMULATE * 4 * 32 / rate < 100 * max(medians.values()) for rate in rates.values())
    assert all(0.05 < gib < 100 for gib in scalars(job.folder, "train/memory_peak").values())


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5e12),
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA H200", "64-true", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed", None),
    ],
)
def test_the_peak_is_that_of_device_and_precision(
    name: str, precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    trainer: Any = Trainer()
    trainer.precision, trainer.strategy.root_device = precision, torch.device("cuda", 0)
    throughput = Throughput()
    with caplog.at_level("INFO"):
        throughput.on_train_start(trainer, Module("tokens"))  # type: ignore[arg-type]
    assert throughput.peak_flops == peak
    said = f"No train/mfu: no peak FLOP/s are known of {name} in trainer.precision={precision}"
    assert (said in caplog.text) == (peak is None)


def test_a_profiler_of_the_user_stays() -> None:
    trainer: Any = Trainer()
    trainer.profiler = profiler = DataWait()
    Throughput().on_train_start(trainer, Module("tokens"))  # type: ignore[arg-type]
    assert trainer.profiler is profiler


def test_a_peak_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.throughput\.peak_flops=0 is not valid"):
        Throughput(peak_flops=0)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_token(tied: bool) -> None:
    """Twice for each multiplication, once forward and twice backward: matrices, then queries by keys and by values."""
    model = Transformer(tiny_config(ffn="moe", tie_embeddings=tied), 50)
    attention, expert, router = 4 * 32 * 32, 3 * 32 * 24, 32 * 4
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # a norm's gain multiplies as well
    multiplications = 2 * (attention + 2 * expert + router) + 32 * 50 + norms + 2 * 2 * 9 * 32
    assert model.flops_per_token(9) == 3 * 2 * multiplications


def test_tokens_go_on_in_a_resumed_process() -> None:
    first, second = Throughput(), Throughput()
    first.units = 300
    second.load_state_dict(first.state_dict())
    second.units = 40
    assert second.total_units == 340
    assert second.state_dict() == {"tokens": 340}
