"""The transformer that fills in tokens which were taken out of a text (BERT, 1810.04805)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import require
from lightning_modules.config import ModelConfig
from lightning_modules.transformer import Transformer, at_places
from lightning_modules.trunk import Asked, Batch, Block

PARTS = 10
MASKED, REPLACED = 8, 1
"""Of PARTS chosen tokens so many become the mask, and so many any token; the rest stays as it is (1810.04805)."""
FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""SplitMix64's 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB, as numbers of int64."""


class Masked(NamedTuple):
    """A text with tokens taken out.

    Attributes:
        tokens: int64 [batch, seq], what the model reads.
        at: int64 [batch, chosen], where it is asked.
        targets: int64 [batch, chosen], what was there.
    """

    tokens: Tensor
    at: Tensor
    targets: Tensor


class MaskedTransformer(Transformer):
    """A Transformer that sees all of a text but the tokens it is asked for. The last row of its embedding is the mask.

    Which tokens are chosen follows from the text and the step alone, by a hash: no random numbers are drawn, so a
    resumed run and one on other numbers of processes choose the same.

    Args:
        config: the architecture; not causal.
        vocab_size: rows of embedding and head, the mask's among them.
        mask_rate: the share of a text's tokens that are chosen, rounded to at least one.
        mask_token: the number of the mask, behind those of the data.
        output_multiplier, branch_multiplier, built: as of Transformer.

    Raises:
        ConfigError: as of Transformer; causal attention, or a share that cannot be.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        mask_rate: float,
        mask_token: int,
        output_multiplier: float = 1.0,
        branch_multiplier: float = 1.0,
        built: Callable[[Block], None] = lambda block: None,
    ) -> None:
        valid = "false: masked tokens are to be seen from both sides"
        require(not config.causal, "model.causal", True, valid)
        require(0 < mask_rate < 1, "module.mask_rate", mask_rate, "a number between 0 and 1")
        super().__init__(config, vocab_size, output_multiplier, branch_multiplier, built)
        self.mask_rate, self.mask_token = mask_rate, mask_token

    def mask(self, tokens: Tensor, step: int = 0) -> Masked:
        """Take tokens out of texts.

        Args:
            tokens: int64 [batch, seq].
            step: the same text has other tokens taken out at another step.
        """
        seq = tokens.size(1)
        places = torch.arange(1, seq + 1, device=tokens.device)
        of_text = mixed((mixed(places) * (tokens + 1)).sum(1, keepdim=True) + step)
        drawn = mixed(of_text + mixed(places))
        at = drawn.argsort(dim=1, stable=True)[:, : max(1, round(self.mask_rate * seq))].sort(dim=1).values
        targets, further = tokens.gather(1, at), mixed(drawn.gather(1, at) + 1)
        part = further.remainder(PARTS)
        anything = shifted(further, 8).remainder(self.mask_token)
        shown = torch.where(part < MASKED, self.mask_token, targets)
        shown = torch.where((part >= MASKED) & (part < MASKED + REPLACED), anything, shown)
        return Masked(tokens.scatter(1, at, shown), at, targets)

    def tokens(self, batch: Batch) -> Tensor:
        """Return what the model reads, as validation has it: with the tokens taken out that step 0 takes out."""
        return self.mask(super().tokens(batch)).tokens

    def asked(self, batch: Batch) -> Asked:
        """Return the tokens that are taken out at step 0."""
        masked = self.mask(super().tokens(batch))
        return Asked(masked.targets, masked.at)

    def read(self, state: Tensor, batch: Batch) -> Tensor:
        return at_places(state, self.asked(batch).at)

    def loss(self, batch: Batch, chunked: bool = False) -> Tensor:
        """Return the mean cross-entropy of the tokens that are taken out at step 0, in nats."""
        masked = self.mask(batch["tokens"][:, :-1])
        if chunked:
            losses, _ = self(masked.tokens, targets=masked.targets, at=masked.at)
            mean: Tensor = losses.mean
            return mean
        logits, _ = self(masked.tokens, at=masked.at)
        return F.cross_entropy(logits.flatten(0, 1).float(), masked.targets.flatten())

    def num_looked_up(self) -> int:
        """Return it with the share of the head that is read at no position: only masked ones are asked for."""
        return super().num_looked_up() + round((1 - self.mask_rate) * self.head.weight.numel())


def mixed(x: Tensor) -> Tensor:
    """Return SplitMix64's finalizer of x, int64: every bit of the input moves every bit of the output."""
    x = (x ^ shifted(x, 30)) * FACTORS[0]
    x = (x ^ shifted(x, 27)) * FACTORS[1]
    return x ^ shifted(x, 31)


def shifted(x: Tensor, places: int) -> Tensor:
    """Return x, int64, shifted right with zeros coming in, as if it had no sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)
