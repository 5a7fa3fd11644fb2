"""Measures what becomes of the hidden state on its way through the blocks, while they train."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from analysis.states import BlockView, kurtosis, mean_square
from analysis.theory import predict_model
from callbacks.charts import BLOCK
from callbacks.monitors.block_monitor import BlockMonitor

PREDICTED = ("variance", "attn_ratio", "ffn_ratio")


class SignalPropagation(BlockMonitor):
    """Logs, for the first optimizer step and every n-th, before it changes the weights:

    | key | unit |
    |---|---|
    | signal/block_NUMBER/variance | mean square of the hidden state after the block, before a final norm |
    | signal/block_NUMBER/attn_ratio | mean square of attention's output over that of the state before the block |
    | signal/block_NUMBER/ffn_ratio | likewise of the FFN's output |
    | signal/block_NUMBER/max | largest magnitude in the hidden state |
    | signal/block_NUMBER/kurtosis | of a token's features, mean over tokens; 3 for Gaussian ones, above: outliers |
    | signal/block_NUMBER/attn_logit_max | largest logit of attention, after scaling |
    | signal/block_NUMBER/attn_entropy | of attention's weights, share of the largest possible, ln of the keys seen |
    | signal/block_NUMBER/variance_theory, .../attn_ratio_theory, .../ffn_ratio_theory | predicted at initialization, |
    | | where docs/theory.md covers the model: a dense FFN in prenorm, postnorm, spannorm or deepnorm |

    Several streams are taken side by side. Arguments, and what is sampled: callbacks/monitors/block_monitor.py.
    """

    name, prefix = "signal_propagation", "signal"
    figures = (*PREDICTED, "max", "kurtosis", "attn_logit_max", "attn_entropy")

    def __init__(self, every_n_steps: int = 100, sequences: int = 2, positions: int = 256) -> None:
        super().__init__(every_n_steps, sequences, positions)
        self._predictions: list[dict[str, float]] = []  # by block; none where there is no theory

    def before_sample(self, trainer: L.Trainer, pl_module: L.LightningModule, num_positions: int) -> None:
        if trainer.global_step == 0:
            model: Any = pl_module.model
            self._predictions = [
                {f"{figure}_theory": getattr(block, figure) for figure in PREDICTED}
                for block in predict_model(model, num_positions) or []
            ]

    def measure(self, view: BlockView) -> tuple[Tensor, ...]:
        before, after = mean_square(view.before), view.after
        logits = view.block.attn.logits(view.attn_input, view.rope)
        return (
            mean_square(after),
            mean_square(view.attn_out) / before,
            mean_square(view.ffn_out) / before,
            after.abs().amax().float(),
            kurtosis(after),
            logits.amax(),
            relative_entropy(logits),
        )

    def constants(self, number: int) -> dict[str, float]:
        return self._predictions[number - 1] if self._predictions else {}

    def charts(self, pl_module: L.LightningModule) -> dict[str, dict[str, str]]:
        charts = super().charts(pl_module)[self.prefix]
        predicted = {figure.replace("_", " "): rf"^signal/{BLOCK}/{figure}(_theory)?$" for figure in PREDICTED}
        return {self.prefix: charts | predicted}

    def state_dict(self) -> dict[str, Any]:
        return {"predictions": self._predictions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._predictions = state_dict["predictions"]


def relative_entropy(logits: Tensor) -> Tensor:
    """Return the mean, over queries that see at least two keys, of attention's entropy over ln(keys seen).

    Args:
        logits: [batch, heads, seq, seq], -inf for keys that a query does not see.
    """
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    # Of a declared type: the logarithm of integers would come in torch's default one, bf16 under bf16-true.
    seen = (logits != -math.inf).sum(-1, dtype=entropy.dtype)
    counts = seen > 1
    return (entropy / seen.log()).where(counts, 0.0).sum() / counts.sum()
