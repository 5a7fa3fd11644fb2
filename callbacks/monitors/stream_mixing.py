"""Measures how the sublayers of a scheme with several streams read, keep and write them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from analysis.states import BlockView
from callbacks.charts import BLOCK
from callbacks.monitors.block_monitor import BlockMonitor

SUBLAYERS = ("attn", "ffn")


class StreamMixing(BlockMonitor):
    """Logs, for the first optimizer step and every n-th, before it changes the weights:

    | key | unit |
    |---|---|
    | streams/block_NUMBER/attn_share_STREAM, .../ffn_share_STREAM | share of each stream in what the sublayer reads: |
    | | of the sizes rms(pre_i R_i) in their sum, or of the mean gates in theirs; mean over tokens |
    | streams/block_NUMBER/attn_write, .../ffn_write | weight of the sublayer's output, mean over streams and tokens |
    | streams/block_NUMBER/gain_forward, .../gain_backward | of the product of all res up to this block: the largest |
    | | sum of magnitudes in a row, and in a column (2512.24880, figure 3); mean over tokens |
    | streams/block_NUMBER/mapping_rank | effective rank of that product, 1 to n; mean over tokens |
    | streams/block_NUMBER/attn_gate, .../ffn_gate | mean gate, where each feature has one (gr) |

    Where a placement has no such mappings (spannorm.Placement.mappings), nothing is measured and nothing written; gain
    and rank only where streams are mixed (hc, mhc). Streams and blocks count from 1. The effective rank is exp of the
    entropy of the normalized singular values. Arguments, and what is sampled: callbacks/monitors/block_monitor.py.
    """

    name, prefix = "stream_mixing", "streams"

    def __init__(self, every_n_steps: int = 100, sequences: int = 2, positions: int = 256) -> None:
        super().__init__(every_n_steps, sequences, positions)
        self.figures = ()  # known once a block has been seen
        self._product: Tensor | None = None  # of all res up to the block in sight, [rows, n, n]

    def applies(self, pl_module: L.LightningModule) -> bool:
        return has_mappings(pl_module)

    def measure(self, view: BlockView) -> tuple[Tensor, ...]:
        values: dict[str, Tensor] = {}
        if view.number == 1:
            self._product = None
        for name, (streams, (pre, post, res)) in zip(SUBLAYERS, view.mappings, strict=True):
            if pre.dim() == 3:
                values[f"{name}_gate"] = pre.float().mean()
                sizes = pre.float().mean(-1)
            else:
                sizes = pre.float().abs() * streams.float().square().mean(-1).sqrt()
            shares = (sizes / sizes.sum(-1, keepdim=True)).mean(0)
            values |= {f"{name}_share_{number}": share for number, share in enumerate(shares, start=1)}
            values[f"{name}_write"] = post.float().mean()
            if res is not None:
                self._product = res.float() if self._product is None else res.float() @ self._product
        if self._product is not None:
            sizes = self._product.abs()
            values["gain_forward"], values["gain_backward"] = (sizes.sum(dim).amax(-1).mean() for dim in (-1, -2))
            values["mapping_rank"] = mean_effective_rank(self._product)
        self.figures = tuple(values)
        return tuple(values.values())

    def charts(self, pl_module: L.LightningModule) -> dict[str, dict[str, str]]:
        """Return what Dashboard lays out: callbacks.protocols.HasCharts."""
        if not has_mappings(pl_module):
            return {}
        figures: tuple[str, ...] = ("gain_forward", "gain_backward", "mapping_rank")
        figures += tuple(f"{name}_{figure}" for name in SUBLAYERS for figure in (r"share_\d+", "write", "gate"))
        return {self.prefix: {figure.replace(r"_\d+", "s"): rf"^streams/{BLOCK}/{figure}$" for figure in figures}}


def has_mappings(pl_module: L.LightningModule) -> bool:
    """Return whether a block's placement says how it maps several streams."""
    model: Any = pl_module.model
    return any(block.placement.mappings() for block in model.blocks)


def mean_effective_rank(matrices: Tensor) -> Tensor:
    """Return exp of the entropy of each matrix' normalized singular values, averaged; matrices [rows, n, n]."""
    matrices = matrices.cpu() if matrices.device.type == "mps" else matrices
    singular = torch.linalg.svdvals(matrices)
    share = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp().mean().to(matrices.device)
