"""The LightningModule: loss, metrics and optimizer around a Transformer."""

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from core.steps import completes_step, is_logged
from lightning_modules.config import ModelConfig, OptimConfig, parse
from lightning_modules.generation import generate
from lightning_modules.initialization import initialize, resolve_init
from lightning_modules.layers.moe import RouterStats
from lightning_modules.optim import make_optimizer, make_schedule
from lightning_modules.transformer import Transformer
from lightning_modules.width_scaling import width_scaling


class LanguageModule(L.LightningModule):
    """Next-token prediction.

    Args:
        model: fields of ModelConfig, as plain values.
        optim: fields of OptimConfig, as plain values.
        vocab_size: number of tokens.

    Raises:
        ConfigError: anything about the model or its optimizer that cannot work, before weights are allocated.

    Logs, every `trainer.log_every_n_steps` optimizer steps and at each validation:

    | key | unit |
    |---|---|
    | train/loss, val/loss | nats per token, without auxiliary losses; train: mean over the accumulated batches |
    | val/perplexity | exp(val/loss) |
    | moe/load_balancing_loss | unweighted mean over layers; 1 is perfect balance |
    | moe/z_loss | unweighted mean over layers |
    | moe/max_load | busiest expert's tokens over the mean, worst layer |
    | optim/lr | learning rate of the step just taken |
    | optim/grad_norm | l2 norm over all parameters, accumulated, before clipping |
    """

    model: Transformer | None

    def __init__(self, model: dict[str, Any], optim: dict[str, Any], vocab_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model_config = parse(ModelConfig, "model", model)
        self.optim_config = parse(OptimConfig, "optim", optim)
        self.vocab_size = vocab_size
        with torch.device("meta"):  # a dry build finds every impossible configuration, at no cost
            self.num_parameters = Transformer(self.model_config, vocab_size).num_parameters()
        self.width_scaling = width_scaling(self.model_config, self.optim_config)
        resolve_init(self.model_config)
        make_schedule(self.optim_config, num_steps=1)
        self.model = None
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()

    def configure_model(self) -> None:
        """Build and initialize; Lightning calls this where the strategy wants the weights to come to life."""
        if self.model is not None:
            return
        self.model = Transformer(self.model_config, self.vocab_size, self.width_scaling.output_multiplier)
        initialize(self.model, self.width_scaling)
        if self.model_config.compile:
            for block in self.model.blocks:
                block.compile()

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[RouterStats]]:
        """tokens [batch, seq] -> (logits [batch, seq, vocab_size], one RouterStats per MoE layer)."""
        assert self.model is not None, "configure_model() comes first"
        return self.model(tokens)

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[RouterStats]]:
        """batch["tokens"] [batch, seq + 1] -> (mean cross-entropy in nats per token, router statistics)."""
        tokens = batch["tokens"]
        logits, router_stats = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()), router_stats

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, router_stats = self._loss(batch)
        self.train_loss.update(loss.detach())
        if not router_stats:
            return loss
        moe = self.model_config.moe
        balance = torch.stack([stats.load_balancing_loss for stats in router_stats]).mean()
        z_loss = torch.stack([stats.z_loss for stats in router_stats]).mean()
        if self._logs_this_step:
            loads = torch.stack([stats.tokens_per_expert for stats in router_stats])
            max_load = (loads.amax(dim=1) / loads.mean(dim=1)).max()
            self.log_dict({"moe/load_balancing_loss": balance, "moe/z_loss": z_loss}, sync_dist=True)
            self.log("moe/max_load", max_load, sync_dist=True, reduce_fx="max")
        return loss + moe.load_balancing_weight * balance + moe.z_loss_weight * z_loss

    @property
    def _logs_this_step(self) -> bool:
        """Whether the optimizer step in progress is one that the loggers will write."""
        return is_logged(self.trainer, self.trainer.global_step + 1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._logs_this_step:
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.log("optim/grad_norm", torch.nn.utils.get_total_norm(gradients))
        self.log("optim/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not completes_step(self.trainer, batch_idx):
            return
        if is_logged(self.trainer, self.trainer.global_step):
            self.log("train/loss", self.train_loss.compute())
        self.train_loss.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, _ = self._loss(batch)
        self.val_loss.update(loss, weight=batch["tokens"][:, 1:].numel())

    def on_validation_epoch_end(self) -> None:
        loss = self.val_loss.compute()
        self.val_loss.reset()
        self.log_dict({"val/loss": loss, "val/perplexity": math.exp(min(float(loss), 700.0))}, sync_dist=False)

    def generate(self, prompt: list[int], num_tokens: int, temperature: float, seed: int, window: int) -> list[int]:
        """The prompt's token ids and `num_tokens` more; see lightning_modules/generation.py."""
        assert self.model is not None, "configure_model() comes first"
        tokens = torch.tensor(prompt, device=self.device)
        return generate(self.model, tokens, num_tokens, temperature, seed, window).tolist()

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        optimizer = make_optimizer(self.model, self.optim_config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, make_schedule(self.optim_config, self.trainer.max_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
