"""The LightningModule of language: next-token prediction, its metrics, and generation around a Transformer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import require
from core.task import OF_LANGUAGE, Task
from lightning_modules.config import ModelConfig
from lightning_modules.cross_entropy import LARGE_VOCABULARY
from lightning_modules.generation import generate
from lightning_modules.layers.router import RouterStats
from lightning_modules.source_loss import SourceLoss
from lightning_modules.transformer import EXAMPLE_VOCABULARY, Transformer
from lightning_modules.transformer_module import SCHEDULE_STEPS, TransformerModule

__all__ = ["LARGE_VOCABULARY", "SCHEDULE_STEPS", "LanguageModule"]


class LanguageModule(TransformerModule):
    """Next-token prediction.

    Args:
        model: fields of ModelConfig, as plain values.
        optim: fields of OptimConfig, as plain values.
        vocab_size: number of tokens in the data; `model.vocab_size` may give embedding and head more rows.

    Attributes:
        vocab_size: rows of embedding and head.
        extra_tokens: how many tokens the model has beside the data's.

    Raises:
        ConfigError: anything about the model or its optimizer that cannot work, before weights are allocated.

    Logs what TransformerModule does, the losses in nats per token, and:

    | key | unit |
    |---|---|
    | train/loss/NAME, val/loss/NAME | train/loss and val/loss of a mixture's sources: data=mixture |
    | val/perplexity | exp(val/loss) |
    | test/loss/NAME, test/perplexity | by trainer.test, what val/... are by validation |
    """

    of_data: ClassVar[tuple[str, ...]] = ("vocab_size",)
    extra_tokens: ClassVar[int] = 0
    task: ClassVar[Task] = OF_LANGUAGE
    model: Transformer | None

    def __init__(self, model: dict[str, Any], optim: dict[str, Any], vocab_size: int) -> None:
        super().__init__(model, optim)
        self.save_hyperparameters()
        self.check_attention()
        rows = self.model_config.vocab_size
        least = vocab_size + self.extra_tokens
        valid = f"at least {least}, the size of the data's vocabulary, or null"
        require(rows is None or rows >= least, "model.vocab_size", rows, valid)
        self.vocab_size = least if rows is None else rows
        self.try_out()
        self.train_sources: SourceLoss | None = None
        self.held_out_sources: SourceLoss | None = None  # of validation, or of a test

    def check_attention(self) -> None:
        """Refuse attention that does not go with what is predicted."""
        valid = "true: a model that sees the tokens to come has nothing to predict; experiment=mlm_spannorm masks some"
        require(self.model_config.causal, "model.causal", False, valid)

    def make_model(self, config: ModelConfig, **arguments: Any) -> Transformer:
        return Transformer(config, self.vocab_size, **arguments)

    @classmethod
    def assumed(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"vocab_size": EXAMPLE_VOCABULARY}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        names = getattr(getattr(self.trainer, "datamodule", None), "source_names", ())
        if names:
            held_out = "test/loss" if stage == "test" else "val/loss"
            self.train_sources, self.held_out_sources = SourceLoss(names, "train/loss"), SourceLoss(names, held_out)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Any, list[RouterStats]]:
        """See Transformer.forward."""
        assert self.model is not None, "configure_model() comes first"
        return self.model(tokens, positions, targets=targets)

    @property
    def loss_is_chunked(self) -> bool:
        return self.vocab_size >= LARGE_VOCABULARY

    def compute_loss(
        self, batch: dict[str, Tensor], sources: SourceLoss | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Return the loss of one batch, and of each source in it, if there are several.

        Args:
            batch: "tokens" [batch, seq + 1]; where documents are kept apart, "positions" [batch, seq]; of a mixture,
                "source" [batch].
            sources: where the losses of the latter go.

        Returns:
            (mean cross-entropy in nats per token, router statistics).
        """
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        if self.loss_is_chunked:
            losses, router_stats = self(inputs, batch.get("positions"), targets)
            if sources is not None:
                sources.update(losses.by_token.view_as(targets).mean(1), batch["source"])
            return losses.mean, router_stats
        logits, router_stats = self(inputs, batch.get("positions"))
        logits = logits.flatten(0, 1).float()
        if sources is None:
            return F.cross_entropy(logits, targets.flatten()), router_stats
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets).mean(1)
        sources.update(losses.detach(), batch["source"])
        return losses.mean(), router_stats

    def training_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[RouterStats]]:
        return self.compute_loss(batch, self.train_sources)

    def held_out_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        loss, _ = self.compute_loss(batch, self.held_out_sources)
        return loss, batch["tokens"][:, 1:].numel()

    def further_metrics(self, stage: str) -> Sequence[SourceLoss]:
        sources = self.train_sources if stage == "train" else self.held_out_sources
        return () if sources is None else (sources,)

    def describe_loss(self, stage: str, loss: Tensor) -> dict[str, Any]:
        return {f"{stage}/perplexity": math.exp(min(float(loss), 700.0))}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the log-probability of each next token, in nats, fp32 [batch, seq].

        Args:
            batch: "tokens" [batch, seq + 1] and what else `compute_loss` takes; entry [i, j] of the result is of
                tokens[i, j + 1], after those up to j.
        """
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        losses, _ = self(inputs, batch.get("positions"), targets)
        by_token: Tensor = losses.by_token
        return -by_token.view_as(targets)

    def generate(self, prompt: list[int], num_tokens: int, temperature: float, seed: int, window: int) -> list[int]:
        """Return the prompt's token ids and `num_tokens` more; see lightning_modules/generation.py."""
        assert self.model is not None, "configure_model() comes first"
        tokens = torch.tensor(prompt, device=self.device)
        with self._precision():
            return generate(self.model, tokens, num_tokens, temperature, seed, window).tolist()
