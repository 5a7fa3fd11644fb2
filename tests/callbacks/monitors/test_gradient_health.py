"""What gradient_health writes, against the same figures taken from copies of each step's gradients and parameters."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks.monitors.gradient_health import GradientHealth
from callbacks.monitors.noise_scale import DECAY, NoiseScale
from callbacks.scalars import written_blocks
from core.errors import ConfigError
from tests.support.fitting import Recorder, fit
from tests.support.models import make_module, tokens
from tests.support.norms import kind_of, norm_by_group

STEPS, EVERY = 6, 2


class Copies(L.Callback):
    """Of gradients and parameters before each step; and the squared gradient norm of each step's first batch."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.parameters: list[dict[str, Tensor]] = []
        self.small_squares: list[float] = []
        self.backward_passes = 0

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.backward_passes % trainer.accumulate_grad_batches == 0:
            squares = sum(p.grad.double().square().sum().item() for p in pl_module.parameters())
            self.small_squares.append(squares * trainer.accumulate_grad_batches**2)
        self.backward_passes += 1

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        named = list(pl_module.model.named_parameters())
        self.gradients.append({name: p.grad.clone() for name, p in named})
        self.parameters.append({name: p.detach().clone() for name, p in named})


class Run:
    """6 steps of 3 batches, every second one logged."""

    accumulate = 3

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.copies, self.recorder = Copies(), Recorder()
        module = make_module(ffn="moe", num_layers=3, optim={"lr": 1e-2})
        batches = [tokens(2, 9) for _ in range(STEPS * self.accumulate)]
        options = {"max_steps": STEPS, "accumulate_grad_batches": self.accumulate, "log_every_n_steps": EVERY}
        self.health = GradientHealth()
        fit(root, module, *batches, callbacks=[self.copies, self.health], logger=self.recorder, **options)

    def series(self, key: str) -> list[float]:
        return self.recorder.series(key)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def key(prefix: str, name: str) -> str:
    block, kind = kind_of(name)
    return f"{prefix}/block_{block}/{kind}" if block else f"{prefix}/{kind}"


def test_each_group_has_its_norms(run: Run) -> None:
    logged = range(EVERY - 1, STEPS, EVERY)
    names = list(run.copies.gradients[0])
    expected: dict[str, list[float]] = {}
    for n in logged:
        gradients, weights = norm_by_group(run.copies.gradients[n]), norm_by_group(run.copies.parameters[n])
        before = run.copies.parameters[n - 1]
        changes = norm_by_group({name: p - before[name] for name, p in run.copies.parameters[n].items()})
        for name in {key("", name): name for name in names}.values():
            group = kind_of(name)
            expected.setdefault(key("gradients", name), []).append(gradients[group])
            expected.setdefault(key("weights", name), []).append(weights[group])
            expected.setdefault(key("updates", name), []).append(changes[group] / weights[group])
    assert len(expected) == 3 * (3 * 5 + 2), "attn_in, attn_out, norm, router and experts; embedding and head"
    assert {name: run.series(name) for name in expected} == {
        name: pytest.approx(values, rel=1e-4) for name, values in expected.items()
    }
    assert run.series("gradients/nonfinite") == [0.0] * len(logged)


def test_first_over_last_and_its_trend(run: Run) -> None:
    steps = np.arange(EVERY, STEPS + 1, EVERY)
    squares = [{g: norm**2 for g, norm in norm_by_group(run.copies.gradients[n - 1]).items()} for n in steps]
    first, last = (np.sqrt([sum(v for g, v in s.items() if g.block == block) for s in squares]) for block in (1, 3))
    assert run.series("gradients/block_1/all") == pytest.approx(first, rel=1e-4)
    assert run.series("gradients/first_over_last") == pytest.approx(first / last, rel=1e-4)
    trends = [0.0, *(np.polyfit(steps[:n], np.log(first / last)[:n], 1)[0] * 100 for n in (2, 3))]
    assert run.series("gradients/first_over_last_trend") == pytest.approx(trends, rel=1e-3)


def test_the_noise_scale_under_accumulation(run: Run) -> None:
    small, large = 2, 2 * Run.accumulate
    signal = noise = 0.0
    expected = []
    for n in range(EVERY - 1, STEPS, EVERY):
        small_square = run.copies.small_squares[n]
        large_square = sum(norm**2 for norm in norm_by_group(run.copies.gradients[n]).values())
        signal = DECAY * signal + (1 - DECAY) * (large * large_square - small * small_square) / (large - small)
        noise = DECAY * noise + (1 - DECAY) * (small_square - large_square) / (1 / small - 1 / large)
        expected += [noise / signal] if signal > 0 and noise > 0 else []
    assert len(expected) > 0
    assert run.series("gradients/noise_scale") == pytest.approx(expected, rel=1e-3)


def test_the_noise_scale_of_known_noise() -> None:
    """Gradients of single sequences: mean of length 2, noise of variance 5 in each of 30 dimensions."""
    generator = np.random.default_rng(0)
    scale, mean = NoiseScale(), np.zeros(30)
    mean[0] = 2.0
    ratios = []
    for _ in range(4000):
        sequences = mean + generator.normal(scale=5**0.5, size=(64, 30))
        small, large = ((sequences[:n].mean(0) ** 2).sum() for n in (8, 64))
        scale.update(small, 8, large, 64)
        ratios.append(scale.value)
    assert np.mean(ratios[100:]) == pytest.approx(5 * 30 / 4, rel=0.05)


def test_hidden_by_noise_it_is_none() -> None:
    scale = NoiseScale()
    scale.update(small_square=10.0, small=1, large_square=1.0, large=2)
    assert scale.value is None


class Shrink(L.Callback):
    """Scales the gradient of the first block in the steps that it is given."""

    def __init__(self, factors: dict[int, float]) -> None:
        self.factors = factors

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.model.blocks[0].parameters():
            parameter.grad *= self.factors.get(trainer.global_step + 1, 1.0)


def test_a_vanishing_gradient_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shrink = Shrink({2: 1e-5, 3: 1e-5, 5: 1e6})
    fit(tmp_path, make_module(), *[tokens(2, 9)] * 5, callbacks=[shrink, GradientHealth()], logger=False, max_steps=5)
    said = [line for line in capsys.readouterr().out.splitlines() if "the gradient" in line]
    assert [line.split(": block 1 has")[0] for line in said] == [
        "step 2: the gradient vanishes",
        "step 5: the gradient explodes",
    ]


class Poison(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        pl_module.model.blocks[1].attn.o_proj.weight.grad[0, :4] = math.nan


def test_the_kinds_that_are_not_finite_are_named(tmp_path: Path) -> None:
    recorder, module = Recorder(), make_module()
    fit(tmp_path, module, tokens(2, 9), callbacks=[Poison(), GradientHealth()], logger=recorder, max_steps=1)
    assert recorder.series("nonfinite/block_2/attn_out") == [4 / 32**2]
    assert recorder.series("gradients/nonfinite") == [pytest.approx(4 / module.num_parameters[0])]
    assert recorder.series("nonfinite/block_1/attn_out") == recorder.series("gradients/first_over_last") == []


def test_histograms_only_where_asked_for(tmp_path: Path) -> None:
    logger, module = TensorBoardLogger(tmp_path, name="", version="log"), make_module()
    fit(tmp_path, module, *[tokens(2, 9)] * 4, callbacks=[GradientHealth(3)], logger=logger, max_steps=4)
    written = EventAccumulator(str(tmp_path / "log"), size_guidance={"histograms": 0}).Reload()
    tags = written.Tags()["histograms"]
    assert len(tags) == 2 * (2 * 5 + 2)
    (event,) = written.Histograms("histograms/weights/block_1/attn_in")
    assert (event.step, event.histogram_value.num) == (2, 3 * 32 * 32)


def test_what_is_averaged_outlives_the_process(run: Run) -> None:
    resumed = GradientHealth()
    resumed.load_state_dict(run.health.state_dict())
    assert resumed.state_dict() == run.health.state_dict()
    assert resumed.noise_scale.signal != 0
    assert len(resumed.state_dict()["ratios"]) == STEPS // EVERY


def test_of_a_deep_model_sixteen_blocks_are_written() -> None:
    assert written_blocks(range(1, 13)) == set(range(1, 13))
    chosen = sorted(written_blocks(range(1, 65)))
    assert (len(chosen), chosen[0], chosen[-1]) == (16, 1, 64)
    assert max(np.diff(chosen)) <= 5


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gradient_health\.histogram_every_n_steps=-1 is not valid"):
        GradientHealth(histogram_every_n_steps=-1)


def test_histograms_leave_out_what_is_no_number(tmp_path: Path) -> None:
    class NoNumber(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            for _, kind, parameter in pl_module.model.parameter_groups():
                if kind == "norm":
                    parameter.grad.fill_(float("nan"))

    logger, module = TensorBoardLogger(tmp_path, name="", version="log"), make_module()
    fit(tmp_path, module, tokens(2, 9), callbacks=[NoNumber(), GradientHealth(1)], logger=logger, max_steps=1)
    tags = EventAccumulator(str(tmp_path / "log"), size_guidance={"histograms": 0}).Reload().Tags()["histograms"]
    assert "histograms/gradients/block_1/attn_in" in tags
    assert "histograms/gradients/block_1/norm" not in tags
    assert "histograms/weights/block_1/norm" in tags
