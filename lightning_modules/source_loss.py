"""The loss of each source of a mixture."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.mean_metrics import WideMetric


class SourceLoss(WideMetric):
    """Mean cross-entropy by source, over the sequences since the last reset and over all processes.

    Args:
        names: of the sources, in the order in which batches count them.
        prefix: of the metric keys.
    """

    total: Tensor
    count: Tensor

    def __init__(self, names: tuple[str, ...], prefix: str) -> None:
        super().__init__()
        self.names, self.prefix = names, prefix
        for state in ("total", "count"):
            self.add_state(state, torch.zeros(len(names), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, losses: Tensor, sources: Tensor) -> None:
        """Add the losses [sequences], in nats per token, of the sources with the numbers `sources` [sequences]."""
        self.total = self.total.index_add(0, sources, losses.to(self.total.dtype))
        self.count = self.count.index_add(0, sources, torch.ones_like(losses, dtype=self.count.dtype))

    def compute(self) -> dict[str, Tensor]:
        """Return {PREFIX/NAME: nats per token} for the sources that came at all."""
        means: list[Any] = list(zip(self.names, self.total / self.count, self.count.tolist(), strict=True))
        return {f"{self.prefix}/{name}": mean for name, mean, count in means if count}
