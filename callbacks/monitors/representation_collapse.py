"""Measures whether tokens, or blocks, become alike."""

import torch.nn.functional as F
from torch import Tensor

from analysis.states import BlockView, effective_rank, mean_cosine
from callbacks.monitors.block_monitor import BlockMonitor


class RepresentationCollapse(BlockMonitor):
    """Logs, for the first optimizer step and every n-th, before it changes the weights:

    | key | unit |
    |---|---|
    | representation/block_NUMBER/token_cosine | mean cosine similarity of two tokens of a sequence, after the block |
    | representation/block_NUMBER/effective_rank | of a sequence's hidden states; at most min(positions, dim) |
    | representation/block_NUMBER/block_cosine | mean cosine similarity of a token's state before and after the block |

    Near 1, a cosine says that tokens are told apart no more, or that a block does nothing. The effective rank is exp of
    the entropy of the normalized singular values (Roy and Vetterli 2007); on CUDA, computing it waits for the device.
    Several streams are taken side by side. Arguments, and what is sampled: callbacks/monitors/block_monitor.py.
    """

    name, prefix = "representation_collapse", "representation"
    figures = ("token_cosine", "effective_rank", "block_cosine")

    def measure(self, view: BlockView) -> tuple[Tensor, ...]:
        after = view.after
        return (
            mean_cosine(after),
            effective_rank(after).float().to(after.device),
            F.cosine_similarity(view.before.float(), after.float(), dim=-1).mean(),
        )
