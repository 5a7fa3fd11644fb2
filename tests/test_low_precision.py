"""Runs in low precision report the losses that their weights have."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from analysis.curvature import top_eigenvalue
from callbacks.monitors.signal_propagation import relative_entropy
from core.open_run import open_run
from core.precision import at_least_fp32, describe_narrow_weights
from lightning_modules.lion import Lion
from lightning_modules.muon import Muon
from lightning_modules.sharding import gradient_norm
from tests.support.runs import load, scalars, tiny_job, train
from tools.evaluation.corpora import losses_of

MANY = ["data.batch_size=1", "data.seq_len=8", "data.val_batches=300"]
LARGE = ["data=synthetic", "data.batch_size=8", "data.seq_len=512", "data.val_batches=8"]


@pytest.mark.parametrize(
    ("precision", "data", "passes"),
    [
        ("bf16-true", MANY, 300),  # a sum of equal terms ends at 256 of them
        ("16-true", LARGE, 1),  # and here at 65504, which is 5.5 nats for each of 12,000 tokens
    ],
)
def test_the_reported_losses_are_those_of_the_weights(
    precision: str, data: list[str], passes: int, tmp_path: Path
) -> None:
    job = [argument for argument in tiny_job() if data is MANY or not argument.startswith("data.")]
    steps = [f"trainer.accumulate_grad_batches={passes}", f"trainer.val_check_interval={passes}", "trainer.max_steps=1"]
    steps += ["optim.eps=1e-4", "optim.lr=1e-5", "callbacks.divergence=null", "callbacks.flight_recorder=null"]
    ended = train(tmp_path, *job, *data, *steps, f"trainer.precision={precision}", "run_dir=run")
    assert ended.code == 0, ended.err
    assert ended.out.count(f"trainer.precision={precision} keeps the weights in ") == 1
    folder = tmp_path / "run"
    (expected,) = losses_of(open_run(folder, "last"), [], None)
    (validation,) = scalars(folder, "val/loss").values()
    assert validation == pytest.approx(expected.loss, rel=2e-3)
    (training,) = scalars(folder, "train/loss").values()
    assert training == pytest.approx(expected.loss, rel=3e-2), "other text, but the same untrained weights"
    score = load(folder / "checkpoints/best.ckpt")["callbacks"]
    best = next(state["best_model_score"] for state in score.values() if "best_model_score" in state)
    assert float(best) == pytest.approx(validation), "what picks the best checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_of_images_too(precision: str, tmp_path: Path) -> None:
    """Single images, so that there are more of them than bfloat16 can count."""
    job = [argument for argument in tiny_job("experiment=vision_spannorm") if not argument.startswith("data.")]
    job += [
        "data.batch_size=1",
        "data.val_batches=360",
        "trainer.accumulate_grad_batches=300",
        "trainer.val_check_interval=300",
    ]
    job += ["trainer.max_steps=1", "optim.eps=1e-4", "optim.lr=1e-5", "callbacks.divergence=null"]
    ended = train(tmp_path, *job, f"trainer.precision={precision}", "run_dir=run")
    assert ended.code == 0, ended.err
    opened = open_run(tmp_path / "run", "last")
    batches = list(opened.datamodule.val_dataloader())
    with torch.no_grad():
        logits = torch.cat([opened.module(batch["images"])[0].double() for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert len(labels) > 256
    expected = {
        "val/loss": F.cross_entropy(logits, labels).item(),
        "val/accuracy": (logits.argmax(-1) == labels).double().mean().item(),
    }
    for tag, value in expected.items():
        (found,) = scalars(tmp_path / "run", tag).values()
        assert found == pytest.approx(value, rel=1e-2), tag
    (training,) = scalars(tmp_path / "run", "train/loss").values()
    assert training == pytest.approx(expected["val/loss"], rel=0.1), "other images, but the same untrained weights"


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_decay_counts_in_bf16(optimizer: str) -> None:
    """By itself a decay of 1.0 would be rounded away at this rate."""

    def norm(decay: float) -> float:
        torch.manual_seed(0)
        weight = torch.nn.Parameter((0.02 * torch.randn(64, 64)).bfloat16())
        group = {"params": [weight], "weight_decay": decay}
        of_muon = {"matrix_rows": 64 if optimizer == "muon" else 0, "update_factor": 1.6}
        made = Lion([group], lr=3e-4) if optimizer == "lion" else Muon([{**group, **of_muon}], lr=3e-4, fused=True)
        for _ in range(600):
            weight.grad = torch.randn(64, 64).bfloat16()
            made.step()
        return weight.float().norm().item()

    assert norm(1.0) < 0.95 * norm(0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_step_of_lion_is_rounded_once_and_in_fp32_to_the_bit_as_ever(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1000).to(dtype))
    weight.grad = torch.randn(1000).to(dtype)
    exact = weight.detach().float().mul_(1 - 0.01 * 0.1).add_(weight.grad.float().sign(), alpha=-0.01)
    Lion([weight], lr=0.01, weight_decay=0.1).step()
    assert torch.equal(weight, exact.to(dtype))


def test_what_narrow_weights_lose_is_said() -> None:
    weight = torch.ones(2, dtype=torch.bfloat16)
    assert torch.equal(weight + torch.tensor([1 / 257, -1 / 513]).bfloat16(), weight)
    assert "in bfloat16: a step below about 1/256 " in str(describe_narrow_weights("bf16-true"))
    assert "in float16: a step below about 1/2048 " in str(describe_narrow_weights("16-true"))
    assert describe_narrow_weights("bf16-mixed") is describe_narrow_weights("32-true") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_sums_of_narrow_tensors_come_in_fp32(dtype: torch.dtype) -> None:
    parameters = [torch.nn.Parameter(torch.randn(50, 50).to(dtype)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.randn(50, 50).mul(3000).to(dtype)  # of a norm beyond float16
    exact = torch.stack([parameter.grad.double().square().sum() for parameter in parameters]).sum().sqrt()
    norm = gradient_norm(parameters)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    assert at_least_fp32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_the_curvature_of_a_narrow_model_is_not_rounded() -> None:
    """Of 0.5 x A x the eigenvalue is the largest of A; a sum of 4096 products in bfloat16 keeps three digits."""
    x = torch.zeros(4096, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.ones(4096).index_fill(0, torch.tensor([7]), 300.0)
    loss = (0.5 * scale * x.float().square()).sum()
    value = top_eigenvalue(loss, [x], iterations=3)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(300, rel=1e-2)


def test_what_a_monitor_computes_does_not_follow_the_default_type() -> None:
    """Under bf16-true Lightning makes bfloat16 torch's default type during the forward pass."""
    logits = torch.randn(2, 4, 33, 33).masked_fill(torch.ones(33, 33).triu(1).bool(), -torch.inf)
    expected = relative_entropy(logits)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(relative_entropy(logits), expected)
    finally:
        torch.set_default_dtype(torch.float32)
