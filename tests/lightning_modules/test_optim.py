"""Which weights decay, what AdamW does with them, and the schedules at points worked out by hand."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from lightning_modules.config import OptimConfig
from lightning_modules.optim import describe_decay, make_schedule
from lightning_modules.optimizers import make_optimizer
from lightning_modules.transformer import Transformer
from tests.support.models import VOCAB_SIZE, tiny_config

DECAYED = ("_proj.weight", "mlp.w1", "mlp.v1", "mlp.w2", "router.layer.weight", "head.weight")


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "dyt"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_matrices_decay_and_norms_biases_and_embeddings_do_not(ffn: str, tied: bool, norm: str) -> None:
    model = Transformer(tiny_config(ffn=ffn, tie_embeddings=tied, norm=norm), VOCAB_SIZE)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {}
    for group in make_optimizer(model, OptimConfig(weight_decay=0.3, lr=0.01)).param_groups:
        assert group["lr"] == 0.01
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in decay, "a parameter in two groups is stepped twice"
            decay[name] = group["weight_decay"]
    assert decay == {name: 0.3 if name.endswith(DECAYED) else 0.0 for name in names.values()}
    assert decay["embedding.weight"] == 0.0
    assert ("head.weight" in decay) != tied


def test_two_steps_of_adamw_with_decoupled_decay() -> None:
    lr, beta1, beta2, eps, weight_decay = 0.1, 0.8, 0.6, 1e-3, 0.5
    model = Transformer(tiny_config(), VOCAB_SIZE)
    optimizer = make_optimizer(model, OptimConfig(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay))
    gradients = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2)]

    expected = {}
    for name, parameter in model.named_parameters():
        p, m, v = parameter.detach().clone(), torch.zeros_like(parameter), torch.zeros_like(parameter)
        for step, gradient in enumerate((gradients[0][name], gradients[1][name]), start=1):
            p *= 1 - lr * (weight_decay if name.endswith(DECAYED) else 0)
            m = beta1 * m + (1 - beta1) * gradient
            v = beta2 * v + (1 - beta2) * gradient**2
            p -= lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        expected[name] = p

    for step in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = step[name]
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("schedule", "options", "points"),
    [
        # 12 steps, warm-up over the first 4, to a tenth of the peak; the cosine's span is 8 steps.
        ("cosine", {}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 6: 0.868198, 8: 0.55, 10: 0.231802, 12: 0.1, 99: 0.1}),
        ("cosine", {"min_lr_ratio": 0.0}, {4: 1.0, 8: 0.5, 12: 0.0}),
        ("cosine", {"warmup_steps": 0}, {0: 1.0, 6: 0.55, 12: 0.1}),
        # the last quarter, 3 steps, decays
        ("wsd", {"decay_fraction": 0.25}, {0: 0.25, 3: 1.0, 4: 1.0, 9: 1.0, 10: 0.7, 11: 0.4, 12: 0.1, 99: 0.1}),
        ("wsd", {"decay_fraction": 1.0, "warmup_steps": 0}, {0: 1.0, 6: 0.55, 12: 0.1}),
        ("constant", {}, {0: 0.25, 3: 1.0, 4: 1.0, 12: 1.0}),
    ],
)
def test_schedule_at_points(schedule: str, options: dict[str, Any], points: dict[int, float]) -> None:
    config = OptimConfig(**{"schedule": schedule, "warmup_steps": 4, "min_lr_ratio": 0.1, **options})
    factor = make_schedule(config, num_steps=12)
    assert {step: factor(step) for step in points} == pytest.approx(points, abs=1e-6)


def test_a_run_shorter_than_its_warm_up_never_reaches_the_peak() -> None:
    factor = make_schedule(OptimConfig(warmup_steps=100), num_steps=10)
    assert [factor(step) for step in (0, 9)] == pytest.approx([0.01, 0.1])


def test_unknown_schedule() -> None:
    with pytest.raises(ConfigError, match=r"optim\.schedule='cosin'.*constant, cosine, wsd.*mean cosine"):
        make_schedule(OptimConfig(schedule="cosin"), num_steps=10)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 7, 8, 40])
def test_a_decay_that_never_comes_is_said(fraction: float, num_steps: int) -> None:
    """Just where a decay is asked for, and no step of several is below the peak."""
    config = OptimConfig(schedule="wsd", decay_fraction=fraction, warmup_steps=0)
    schedule = make_schedule(config, num_steps)
    decays = min(schedule(step) for step in range(num_steps)) < 1
    line = describe_decay(config, num_steps)
    assert (line is not None) == (fraction > 0 and num_steps > 1 and not decays)
    assert line is None or f"optim.decay_fraction={fraction:g} of {num_steps} steps is one step" in line
    assert describe_decay(dataclasses.replace(config, schedule="cosine"), num_steps) is None
    assert describe_decay(config, math.inf) is None
