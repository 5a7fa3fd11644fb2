"""Measures what surrounds a training step in Lightning's Trainer."""

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import judged
from lightning_modules.language_module import LanguageModule

WINDOW = 10  # steps


class Job(NamedTuple):
    """Says what is trained: a step should take about 200 ms."""

    model: dict[str, int]
    seq_len: int


JOBS = {
    "cpu": Job({"num_layers": 4, "dim": 128, "num_heads": 4}, 112),
    "cuda": Job({"num_layers": 16, "dim": 1024, "num_heads": 16}, 2048),
}


class _Tokens(Dataset[dict[str, torch.Tensor]]):
    """One batch [16, seq_len + 1], again and again."""

    def __init__(self, seq_len: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = {"tokens": torch.randint(257, (16, seq_len + 1), generator=generator)}

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.batch


class _BareLoop(L.Callback):
    """After each window of the Trainer's steps, as many without it: same module, optimizer, clipping, and data."""

    def __init__(self, data: _Tokens) -> None:
        self.data = data
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % WINDOW:
            return
        now = _now()
        if self._began:
            self.trainer_seconds.append(now - self._began)
        self.bare(trainer, pl_module)
        self._began = _now()
        self.bare_seconds.append(self._began - now)

    def bare(self, trainer: L.Trainer, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        schedule: Any = trainer.lr_scheduler_configs[0].scheduler
        batches = iter(DataLoader(self.data, batch_size=None))
        for _ in range(WINDOW):
            batch = {name: tensor.to(module.device) for name, tensor in next(batches).items()}
            with trainer.precision_plugin.forward_context():
                loss, _ = module.compute_loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def _now() -> float:
    """Return the seconds, when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def trainer_overhead(title: str, device: str, rounds: int) -> Iterator[str]:
    """Measure the Trainer's loop, hooks and this project's own logging, without callbacks and loggers."""
    job = JOBS[device]
    module = LanguageModule(job.model, {}, 257)
    data = _Tokens(job.seq_len)
    loop = _BareLoop(data)
    trainer = L.Trainer(
        accelerator=device.replace("cuda", "gpu"),
        devices=1,
        max_steps=(rounds + 1) * WINDOW,
        precision="32-true" if device == "cpu" else "bf16-mixed",
        gradient_clip_val=1.0,
        log_every_n_steps=WINDOW,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[loop],
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    bare = loop.bare_seconds[:-1]  # each with the Trainer's window that comes after it
    differences = [a / b for a, b in zip(loop.trainer_seconds, bare, strict=True)]
    low, middle, high = statistics.quantiles(differences, n=4)
    yield f"\n## {title}\n"
    yield f"Windows of {WINDOW} steps in turn, with and without it; a step takes "
    yield f"{1e3 * statistics.median(bare) / WINDOW:.0f} ms without.\n"
    yield f"Goal: at most 1.03 times the bare loop: {middle:.3f} (quartiles {low:.3f}, {high:.3f}), "
    yield f"{judged(middle <= 1.03)}."
