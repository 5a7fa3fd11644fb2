"""Tokens a second: of training steps, without validation, over all ranks, since step 0."""

from typing import Any

import pytest
import torch

from callbacks.throughput import Throughput


class Module:
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log(self, name: str, value: float) -> None:
        self.logged.append({name: value})


class Trainer:
    world_size, accumulate_grad_batches, log_every_n_steps, max_steps, global_step = 2, 2, 2, 100, 0


def test_validation_does_not_count_and_windows_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of 2 batches, 1 s a batch but 3 s in the last two steps; 50 s of validation in between."""
    now = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    throughput, trainer, module = Throughput(), Trainer(), Module()
    batch = {"tokens": torch.zeros(4, 33, dtype=torch.int64)}  # on each of two ranks
    for index in range(8):
        arguments: tuple[Any, ...] = (trainer, module)
        throughput.on_train_batch_start(*arguments, batch, index)
        now[0] += 1.0 if index < 4 else 3.0
        trainer.global_step = (index + 1) // 2
        throughput.on_train_batch_end(*arguments, None, batch, index)
        if index == 3:
            throughput.on_validation_start(*arguments)
            now[0] += 50.0
    tokens = 4 * 32 * 2
    rates = [entry["train/tokens_per_second"] for entry in module.logged if "train/tokens_per_second" in entry]
    assert rates == pytest.approx([tokens / 1.0, tokens / 3.0])
    assert [entry["train/tokens"] for entry in module.logged if "train/tokens" in entry] == [4 * tokens, 8 * tokens]
    assert throughput.tokens_per_second == pytest.approx(8 * tokens / 16.0)


def test_tokens_go_on_in_a_resumed_process() -> None:
    first, second = Throughput(), Throughput()
    first.tokens = 300
    second.load_state_dict(first.state_dict())
    second.tokens = 40
    assert second.total_tokens == 340
    assert second.state_dict() == {"tokens": 340}
