"""Which gradients each hook of a callback sees, as docs/own_pieces.md has it in a table."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from callbacks.divergence.divergence import Divergence
from callbacks.statistics import gradient_statistics
from lightning_modules.language_module import LanguageModule
from tests.support.fitting import fit
from tests.support.models import make_module, tokens

CLIP, BATCHES, STEPS = 0.01, 2, 2


def norm_of(module: Any) -> float | None:
    squares = [p.grad.double().square().sum() for p in module.parameters() if p.grad is not None]
    return math.sqrt(sum(map(float, squares))) if squares else None


class Norms(L.Callback):
    """Of all gradients, by hook, in the order of the calls."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float | None]] = {}
        self.expected: list[list[Tensor]] = []  # of each batch, its own gradient by itself

    def note(self, hook: str, module: Any) -> None:
        self.seen.setdefault(hook, []).append(norm_of(module))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        loss, _ = module.compute_loss(batch)
        self.expected.append(list(torch.autograd.grad(loss, list(module.parameters()))))

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.note("on_before_zero_grad", pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.note("on_before_backward", pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.note("on_after_backward", pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.note("on_before_optimizer_step", pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note("on_train_batch_end", pl_module)


def test_accumulated_and_clipped_as_the_page_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, norms = make_module(), Norms()
    options = {"accumulate_grad_batches": BATCHES, "gradient_clip_val": CLIP, "logger": False, "max_steps": STEPS}
    fit(tmp_path, module, *[tokens(2, 9) for _ in range(STEPS * BATCHES)], callbacks=[norms], **options)

    def whole(*parts: list[Tensor]) -> Any:
        sums = [sum(grads) / BATCHES for grads in zip(*parts, strict=True)]
        return pytest.approx(math.sqrt(sum(float(grad.double().square().sum()) for grad in sums)), rel=1e-5)

    clipped = pytest.approx(CLIP, rel=1e-3)
    first, second, third, fourth = norms.expected
    steps = [whole(first, second), whole(third, fourth)]
    assert norms.seen == {
        "on_before_zero_grad": [None, clipped],
        "on_before_backward": [None, whole(first), None, whole(third)],
        "on_after_backward": [whole(first), steps[0], whole(third), steps[1]],
        "on_before_optimizer_step": steps,
        "on_train_batch_end": [whole(first), clipped, whole(third), clipped],
    }


def test_the_scale_of_fp16_is_undone_before_the_optimizers_hook(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, norms = make_module(), Norms()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    fit(tmp_path, module, tokens(2, 9), callbacks=[norms], logger=False, max_steps=1, plugins=[precision])
    (scaled,), (whole,) = norms.seen["on_after_backward"], norms.seen["on_before_optimizer_step"]
    assert scaled is not None
    assert scaled / 1024 == pytest.approx(whole, rel=1e-5)
    expected = math.sqrt(sum(float(grad.double().square().sum()) for grad in norms.expected[0]))
    assert whole == pytest.approx(expected, rel=0.05), "in fp32"


def test_a_policy_acts_before_a_callback_that_comes_after_it_and_statistics_are_taken_before(tmp_path: Path) -> None:
    class Statistics(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.total = gradient_statistics(trainer, pl_module).total_norm

    torch.manual_seed(0)
    module, norms, statistics = make_module(), Norms(), Statistics()
    batch = tokens(2, 9)
    batch_loss = module.compute_loss({"tokens": batch})[0]
    grads = torch.autograd.grad(batch_loss, list(module.parameters()))
    expected = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    halved = Halving(str(tmp_path))
    fit(tmp_path, module, batch, callbacks=[halved, norms, statistics], logger=False, max_steps=1)
    assert norms.seen["on_before_optimizer_step"] == [pytest.approx(expected / 2, rel=1e-5)]
    assert statistics.total == pytest.approx(expected, rel=1e-5)


class Halving(Divergence):
    """As a policy that scales every step: behind the statistics, in the same hook."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        assert isinstance(pl_module, LanguageModule)
        for parameter in pl_module.parameters():
            assert parameter.grad is not None
            parameter.grad /= 2
