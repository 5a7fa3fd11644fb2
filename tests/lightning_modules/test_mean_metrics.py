"""Means that stay right whatever precision the module around them is cast to, held against sums in float64."""

import copy
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_modules.mean_metrics import WeightedMean
from lightning_modules.source_loss import SourceLoss
from tests.support.models import make_module, tokens

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_sum_goes_on_growing_in_a_module_of_low_precision(dtype: torch.dtype) -> None:
    """In bfloat16 it would stall at 256 terms, in float16 overflow at 65504."""
    mean = nn.ModuleList([WeightedMean()]).to(dtype)[0]
    losses = torch.rand(3000) + 5
    for number, loss in enumerate(losses):
        mean.update(loss.to(dtype), weight=4096 + number)
    weights = torch.arange(4096, 4096 + 3000, dtype=torch.float64)
    expected = (losses.to(dtype).double() * weights).sum() / weights.sum()
    assert mean.compute().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_losses_of_sources_likewise(dtype: torch.dtype) -> None:
    metric = SourceLoss(("a", "b"), "loss").to(dtype)
    losses, sources = torch.rand(3000, 4) + torch.tensor([5.0, 2.0, 5.0, 2.0]), torch.tensor([0, 1, 0, 1])
    for batch in losses:
        metric.update(batch, sources)
    expected = {"loss/a": losses[:, ::2].double().mean().item(), "loss/b": losses[:, 1::2].double().mean().item()}
    assert {name: mean.item() for name, mean in metric.compute().items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "cast_back", "deepcopy"])
def test_no_way_of_casting_makes_it_narrow(cast: str) -> None:
    mean: Any = WeightedMean()
    mean.update(torch.tensor(1 / 3))
    exact = mean.compute().clone()
    if cast == "to":
        mean = mean.to(torch.bfloat16)
    elif cast == "cast_back":
        mean = mean.to(torch.float16).to(torch.float32)
    elif cast == "deepcopy":
        mean = copy.deepcopy(mean).to(torch.bfloat16)
    else:
        mean = getattr(mean, cast)()
    assert torch.equal(mean.compute(), exact), "what was summed before is not rounded either"
    mean.reset()
    mean.update(torch.tensor(1 / 3))
    assert torch.equal(mean.compute(), exact), "nor what it starts from again"
    assert mean.to(torch.float64).total.dtype == torch.float64


def test_what_is_not_a_number_stays_so_and_nothing_is_nothing() -> None:
    mean = WeightedMean()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(mean.compute())
    mean.update(torch.tensor(1.0))
    mean.update(torch.tensor(math.nan))
    assert math.isnan(mean.compute())
    mean.reset()
    mean.update(torch.tensor(2.0), weight=3)
    mean.update(torch.tensor(4.0))
    assert mean.compute() == 2.5


class Sources(L.LightningDataModule):
    """Batches of two sources."""

    source_names = ("a", "b")

    def train_dataloader(self) -> Any:
        batch = {"tokens": tokens(4, 9), "source": torch.tensor([0, 1, 0, 1])}
        return DataLoader([batch] * 4, batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_no_metric_of_the_module_is_narrow_in_any_precision(precision: Any, tmp_path: Any) -> None:
    """Whatever metric is added to the module later, too."""
    module, seen = make_module(ffn="moe"), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            for metric in module.modules():
                if isinstance(metric, Metric):
                    seen.extend((type(metric).__name__, v.dtype) for v in metric.metric_state.values())

    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu", precision=precision, max_steps=2, logger=False, callbacks=[Look()],
        default_root_dir=tmp_path, **quiet,
    )  # fmt: skip
    trainer.fit(module, datamodule=Sources())
    assert {name for name, _ in seen} >= {"WeightedMean", "SourceLoss"}
    assert {dtype for _, dtype in seen} == {torch.float32}
