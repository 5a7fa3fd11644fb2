"""Which weights decay, what AdamW does with them, and the schedules at points worked out by hand."""

import cmath
import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.checkpointing.last_checkpoint import LastCheckpoint
from core.errors import ConfigError
from datamodules.synthetic import Synthetic
from lightning_modules.config import OptimConfig
from lightning_modules.language_module import LanguageModule
from lightning_modules.optim import check_schedule, describe_decay, make_schedule
from lightning_modules.optimizers import make_optimizer
from lightning_modules.transformer import Transformer
from tests.support.fitting import Recorder, make_trainer
from tests.support.models import VOCAB_SIZE, tiny_config, tiny_values

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


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_cosine_is_half_a_wave(warmup: int) -> None:
    """By complex numbers, and by its symmetry: what it has lost and what is left swap about the middle."""
    steps, least = 43, 0.2
    factor = make_schedule(OptimConfig(schedule="cosine", warmup_steps=warmup, min_lr_ratio=least), num_steps=steps)
    turn = cmath.exp(1j * cmath.pi / (steps - warmup))
    for n in range(warmup, steps + 1):
        assert factor(n) == pytest.approx(least + (1 - least) * (1 + (turn ** (n - warmup)).real) / 2, abs=1e-12)
        assert factor(n) + factor(steps + warmup - n) == pytest.approx(1 + least, abs=1e-12)


@pytest.mark.parametrize(("steps", "fraction", "halving"), [(100, 0.1, 5.0), (80, 0.25, 7.0), (30, 1.0, 10.0)])
def test_wsds_exponential_decay_is_the_published_one(steps: int, fraction: float, halving: float) -> None:
    """2404.06395: eta s/W, then eta, then 0.5^((s - S)/T) eta, S where the decay begins, T its half-life in steps."""
    warmup, length = (0 if fraction == 1 else 4), round(fraction * steps)
    decay = {"decay_fraction": fraction, "decay_shape": "exponential", "min_lr_ratio": 0.5 ** (length / halving)}
    factor = make_schedule(OptimConfig(schedule="wsd", warmup_steps=warmup, **decay), num_steps=steps)
    begins = steps - length
    published = [
        (s + 1) / warmup if s < warmup else 1.0 if s < begins else 0.5 ** ((s - begins) / halving) for s in range(steps)
    ]
    assert [factor(s) for s in range(steps)] == pytest.approx(published, rel=1e-12)
    ratios = [factor(s + 1) / factor(s) for s in range(begins, steps)]
    assert ratios == pytest.approx([0.5 ** (1 / halving)] * length), "by one factor a step"


def test_wsds_linear_decay_has_one_slope() -> None:
    factor = make_schedule(OptimConfig(schedule="wsd", decay_fraction=0.5, min_lr_ratio=0.2, warmup_steps=2), 20)
    assert [factor(n) for n in range(2, 11)] == [1.0] * 9
    assert [factor(n) - factor(n + 1) for n in range(10, 20)] == pytest.approx([0.08] * 10)
    assert factor(20) == factor(50) == pytest.approx(0.2)


OWN = """
import numpy
import torch

stairs = lambda config, num_steps: lambda step: 1 if step < num_steps // 2 else numpy.float32(0.5)
needs_steps = lambda config, num_steps: (lambda step, span=1 / (num_steps - 1): 1 - step * span)
negative = lambda config, num_steps: lambda step: 1 - step / 10
undefined = lambda config, num_steps: lambda step: float("nan") if step == 17 else 1.0
endless = lambda config, num_steps: lambda step: float("inf") if step == num_steps - 1 else 1.0
text = lambda config, num_steps: lambda step: "1.0"
nothing = lambda config, num_steps: lambda step: None
switch = lambda config, num_steps: lambda step: True
tensor = lambda config, num_steps: lambda step: torch.ones(2)
bare = lambda config, num_steps: 0.5

def broken(config, num_steps):
    return lambda step: 1 / (12 - step)

def unmade(config, num_steps):
    return config.rate
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_schedules.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_schedules", None)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant", "my_schedules.stairs"])
@pytest.mark.usefixtures("own")
def test_the_warm_up_is_a_line_in_front_of_each(schedule: str) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=8, decay_fraction=0.2)
    factor = make_schedule(config, num_steps=50)
    assert [factor(n) for n in range(8)] == pytest.approx([(n + 1) / 8 for n in range(8)])
    assert all(type(factor(n)) is float for n in range(50))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("negative", "expected one that gives finite numbers >= 0, factors on optim.lr; at step 11 it gives -0.1"),
        ("undefined", "at step 17 it gives nan"),
        ("endless", "at step 29 it gives inf"),
        ("text", "at step 2 it gives 1.0"),
        ("nothing", "at step 2 it gives None"),
        ("switch", "at step 2 it gives True"),
        ("tensor", "at step 2 it gives tensor"),
        ("bare", "expected a function of an OptimConfig and the number of steps that returns a Schedule"),
        ("broken", "it raises ZeroDivisionError: division by zero (my_schedules.py, line 17)"),
        ("unmade", "it raises AttributeError: 'OptimConfig' object has no attribute 'rate' (my_schedules.py, line 20)"),
    ],
)
@pytest.mark.usefixtures("own")
def test_an_own_schedule_that_returns_nonsense_is_refused_before_a_step(name: str, said: str) -> None:
    """And by the schedule itself, where a resumed run of another length comes to such a step."""
    config = OptimConfig(schedule=f"my_schedules.{name}", warmup_steps=2)
    line = rf"^optim\.schedule='my_schedules\.{name}' is not valid: .*{re.escape(said)}"
    with pytest.raises(ConfigError, match=line) as caught:
        check_schedule(config, 30)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=re.escape(said)):
        list(map(make_schedule(config, 30), range(30)))


@pytest.mark.usefixtures("own")
def test_an_own_schedule_is_tried_at_the_runs_length_alone() -> None:
    """One that divides by the number of steps would fail at any made-up one."""
    check_schedule(OptimConfig(schedule="my_schedules.needs_steps", warmup_steps=0), 30)
    LanguageModule(tiny_values(), {"schedule": "my_schedules.needs_steps"}, VOCAB_SIZE)
    for steps in (100_001, 10**7):
        with pytest.raises(ConfigError, match=f"at step {steps - 1} it gives inf"):
            check_schedule(OptimConfig(schedule="my_schedules.endless"), steps)


STOPPED, WHOLE = 5, 8
RESUMED: dict[str, dict[str, Any]] = {
    "cosine": {},
    "wsd": {"decay_fraction": 0.5},
    "wsd, exponential": {"decay_fraction": 0.5, "decay_shape": "exponential"},
    "constant": {},
    "my_schedules.stairs": {},
}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")  # the position is ours
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.usefixtures("own")
def test_each_goes_on_to_the_bit_where_it_was_stopped(name: str, tmp_path: Path) -> None:
    """At the fifth of eight steps: the decay of wsd has begun."""
    optim = {"schedule": name.partition(",")[0], "warmup_steps": 2, "lr": 1e-2, **RESUMED[name]}
    ends, rates = [], []
    for resumed in (False, True):
        torch.manual_seed(1)
        module, recorder = LanguageModule(tiny_values(), optim, VOCAB_SIZE), Recorder()
        options: dict[str, Any] = {"max_steps": WHOLE, "logger": recorder, "limit_val_batches": 0}
        if not resumed:
            options |= {"callbacks": [LastCheckpoint(str(tmp_path / "saved"), STOPPED)], "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, **options)
        path = tmp_path / "saved/previous.ckpt" if resumed else None
        data = Synthetic("copy", VOCAB_SIZE, seq_len=8, batch_size=2, val_batches=1)
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        ends.append(module.state_dict())
        rates.append(recorder.series("optim/lr"))
    assert len(rates[1]) == WHOLE - STOPPED
    assert rates[1] == rates[0][STOPPED:]
    assert (len(set(rates[0][2:])) > 1) == (name != "constant")
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


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
