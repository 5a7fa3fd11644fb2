"""Runs of a tiny model by any strategy, in this process or in several that meet."""

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from core.checkpoint import CheckpointIO
from core.parallel import apply_micro_batching
from datamodules.images.digits import Digits
from datamodules.samples import Numbers, Rows, Samples
from lightning_modules.language_module import LanguageModule
from lightning_modules.strategy import ShardedStrategy
from lightning_modules.transformer_module import TransformerModule
from lightning_modules.vision_module import VisionModule
from tests.support.models import tiny_values
from tests.support.processes import QUIET
from tests.support.runs import TinyData

STEPS = 20


class Run(NamedTuple):
    """What is trained, and how.

    Attributes:
        strategy: one, ddp, fsdp, tp (tensor parallel over all processes), ep (experts shared out), or mesh (pairs cut
            a model, its experts are shared out over the pairs).
        num_processes: which there must be.
        load: name of a checkpoint in the folder.
        save: likewise; it is written after step `save_at`, while the run goes on.
        double: in fp64.
        sources: every other sequence is of another source.
        optim: more fields of OptimConfig.
        images: of digits instead of text.
    """

    strategy: str = "one"
    ffn: str = "dense"
    placement: str = "spannorm"
    num_processes: int = 1
    micro_batch_size: int | None = None
    clip: float = 0.5  # below the gradient norms of these models
    steps: int = STEPS
    load: str | None = None
    save: str | None = None
    save_at: int = 0
    options: tuple[tuple[str, Any], ...] = ()  # more fields of ModelConfig
    double: bool = False
    sources: bool = False
    optim: tuple[tuple[str, Any], ...] = ()
    images: bool = False

    def make_strategy(self) -> Any:
        if self.strategy == "one":
            return "auto"
        if self.strategy == "ddp":
            return DDPStrategy(process_group_backend="gloo")
        return ShardedStrategy(tensor_parallel_size={"tp": self.num_processes, "mesh": 2}.get(self.strategy, 1))

    def make_module(self) -> TransformerModule:
        shares = {"ep": self.num_processes, "mesh": self.num_processes // 2}
        options = dict(self.options)  # tuples of pairs, as runs are keys of a dictionary
        options["placement_options"] = dict(options.pop("placement_options", ()))
        moe = {"expert_parallel": shares.get(self.strategy, 1), **options.pop("moe", {})}
        values = tiny_values(ffn=self.ffn, placement=self.placement, moe=moe, **options)
        optim = {"warmup_steps": 2, "schedule": "constant", "lr": 1e-2, **dict(self.optim)}
        if self.images:
            return VisionModule({**values, "causal": False}, optim, 8, 1, 10, patch_size=4)
        return LanguageModule(values, optim, vocab_size=257)

    def make_data(self, folder: Path) -> Any:
        if self.images:
            return Digits(batch_size=4, val_batches=2)
        return (TwoSources if self.sources else TinyData)(folder, seq_len=16)


class Sources:
    """Samples of two sources in turn."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def read(self, numbers: Numbers) -> Rows:
        return {**self.samples.read(numbers), "source": numbers % 2}


class TwoSources(TinyData):
    """As a mixture's."""

    source_names = ("even", "odd")

    def samples(self, split: str) -> Any:
        return Sources(super().samples(split))


class Curve(L.Callback):
    """The metrics after each step, at the beginning of the next one: by then all have been logged."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.callback_metrics and trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class SaveAt(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def train(folder: Path, run: Run) -> list[dict[str, float]]:
    """The metrics of every step."""
    torch.manual_seed(0)
    saving = [SaveAt(folder / run.save, run.save_at)] if run.save else []
    module, datamodule, curve = run.make_module(), run.make_data(folder), Curve()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=run.num_processes,
        strategy=run.make_strategy(),
        max_steps=run.steps,
        max_epochs=-1,
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        gradient_clip_val=run.clip,
        log_every_n_steps=1,
        callbacks=[*saving, curve],
        plugins=[CheckpointIO()],
        default_root_dir=folder,
        **QUIET,
    )
    datamodule.prepare_data()
    apply_micro_batching(trainer, datamodule, run.micro_batch_size)
    ckpt_path = folder / run.load if run.load else None
    try:
        torch.set_default_dtype(
            torch.float64 if run.double else torch.float32
        )  # ModelParallelStrategy takes no "64-true"
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    finally:
        torch.set_default_dtype(torch.float32)
    return curve.values
