"""The LightningModule of masked language modelling: tokens that were taken out of a text are filled in."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from core.errors import require
from core.task import NATS_PER_TOKEN, Task
from lightning_modules.config import ModelConfig
from lightning_modules.language_module import LanguageModule
from lightning_modules.layers.router import RouterStats
from lightning_modules.masked_transformer import MaskedTransformer
from lightning_modules.source_loss import SourceLoss


class MaskedLanguageModule(LanguageModule):
    """Masked-token prediction (1810.04805), with attention that sees everything (model.causal=false).

    Args:
        model: fields of ModelConfig, as plain values; not causal.
        optim: fields of OptimConfig, as plain values.
        vocab_size: number of tokens in the data; the mask is one more.
        mask_rate: the share of a sequence's tokens that the model is asked for.

    Raises:
        ConfigError: anything about the model or its optimizer that cannot work, before weights are allocated.

    Logs what LanguageModule does, the losses in nats per token that was asked for. In training a text has other tokens
    taken out at each step, in validation always the same.
    """

    extra_tokens: ClassVar[int] = 1
    task: ClassVar[Task] = Task(
        NATS_PER_TOKEN, counted="tokens", position="token", predicted="tokens that are taken out of a text"
    )
    model: MaskedTransformer | None

    def __init__(self, model: dict[str, Any], optim: dict[str, Any], vocab_size: int, mask_rate: float = 0.15) -> None:
        self.mask_rate, self.mask_token = mask_rate, vocab_size
        super().__init__(model, optim, vocab_size)

    def check_attention(self) -> None:
        valid = "false: masked tokens are to be seen from both sides"
        require(not self.model_config.causal, "model.causal", True, valid)

    def make_model(self, config: ModelConfig, **arguments: Any) -> MaskedTransformer:
        return MaskedTransformer(config, self.vocab_size, self.mask_rate, self.mask_token, **arguments)

    def compute_loss(
        self, batch: dict[str, Tensor], sources: SourceLoss | None = None, step: int = 0
    ) -> tuple[Tensor, list[RouterStats]]:
        """Return the loss of one batch, and of each source in it, if there are several.

        Args:
            batch: as LanguageModule's, of which the last token of each sequence is not used.
            sources: where the losses of the latter go.
            step: which tokens are taken out.

        Returns:
            (mean cross-entropy in nats per token that was taken out, router statistics).
        """
        assert self.model is not None, "configure_model() comes first"
        masked = self.model.mask(batch["tokens"][:, :-1], step)
        positions = batch.get("positions")
        if self.loss_is_chunked:
            losses, router_stats = self.model(masked.tokens, positions, targets=masked.targets, at=masked.at)
            mean, by_token = losses.mean, losses.by_token.view_as(masked.targets)
        else:
            logits, router_stats = self.model(masked.tokens, positions, at=masked.at)
            every = F.cross_entropy(logits.flatten(0, 1).float(), masked.targets.flatten(), reduction="none")
            mean, by_token = every.mean(), every.detach().view_as(masked.targets)
        if sources is not None:
            sources.update(by_token.mean(1), batch["source"])
        return mean, router_stats

    def training_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[RouterStats]]:
        trainer = self._attached_trainer
        return self.compute_loss(batch, self.train_sources, 0 if trainer is None else trainer.global_step + 1)

    def held_out_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        loss, _ = self.compute_loss(batch, self.held_out_sources)
        assert self.model is not None
        return loss, self.model.mask(batch["tokens"][:, :-1]).at.numel()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the log-probability of each token that validation takes out, in nats, fp32 [batch, chosen]."""
        assert self.model is not None
        masked = self.model.mask(batch["tokens"][:, :-1])
        losses, _ = self.model(masked.tokens, batch.get("positions"), targets=masked.targets, at=masked.at)
        by_token: Tensor = losses.by_token
        return -by_token.view_as(masked.targets)
