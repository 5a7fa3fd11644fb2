"""Products of fp32 on a GPU: said and set there, and left alone on a CPU, whose curves they would change."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.accelerator import check_matmul_precision, set_matmul_precision
from core.errors import ConfigError, UserError
from tests.support.runs import tiny_job, train


@pytest.mark.parametrize(
    ("precision", "device", "expected", "said"),
    [
        ("high", "cuda", ["high"], "Products of fp32 are made in TF32: float32_matmul_precision=high\n"),
        ("highest", "cuda", ["highest"], "Products of fp32 are made in fp32: float32_matmul_precision=highest\n"),
        ("high", "cpu", [], ""),
    ],
)
def test_it_is_set_on_a_gpu_alone(
    precision: str,
    device: str,
    expected: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", given.append)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), is_global_zero=True)
    set_matmul_precision(trainer, precision)
    assert given == expected
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("precision", ["hihg", None, 1])
def test_another_word_is_refused(precision: object) -> None:
    with pytest.raises(ConfigError, match=r"float32_matmul_precision=.* expected one of highest, high, medium"):
        check_matmul_precision(precision)


def test_a_run_sets_what_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(trainer: Any, precision: str) -> None:
        raise UserError(f"{precision} on {trainer.strategy.root_device}")

    monkeypatch.setattr("core.accelerator.set_matmul_precision", stop)
    ended = train(tmp_path, *tiny_job("float32_matmul_precision=medium"), "run_dir=run")
    assert (ended.code, ended.err) == (2, "Error: medium on cpu\n")
