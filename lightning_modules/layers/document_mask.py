"""Attention, causal or not, that does not cross documents packed into one sequence."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask
"""Who may look at whom: bool [batch, 1, seq, seq], or the same as FlexAttention has it."""


def document_mask(positions: Tensor, flex: bool, causal: bool = True) -> Mask:
    """Return the mask of packed documents.

    Args:
        positions: [batch, seq], 0 where a document begins.
        flex: whether attention is FlexAttention, which skips what is masked but pays off only on a GPU and compiled.
        causal: whether tokens to come are masked, too.
    """
    documents = (positions == 0).cumsum(-1)
    if not flex:
        same = documents[:, :, None] == documents[:, None, :]
        return (same.tril() if causal else same)[:, None]

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = documents[batch, query] == documents[batch, key]
        return (query >= key) & same if causal else same

    num_rows, seq_len = positions.shape
    build = _compiled_create_block_mask() if positions.is_cuda else create_block_mask
    return build(allowed, num_rows, None, seq_len, seq_len, device=positions.device)


@cache
def _compiled_create_block_mask() -> Any:
    return torch.compile(create_block_mask)  # uncompiled it holds the whole mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, grouped: bool, causal: bool = True) -> Tensor:
    """Return softmax attention; each tensor is [batch, heads, seq, head_dim].

    Args:
        mask: None: one document a sequence.
        grouped: whether k and v have fewer heads.
        causal: whether a query sees no later keys, where there is no mask that says it.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    if isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out
    with _kernels_with_a_gradient(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _kernels_with_a_gradient(q: Tensor) -> AbstractContextManager[Any]:
    """Leave cuDNN out where an explicit mask is trained with.

    Its gradient is NaN at lengths of 64 mod 128 where the logits are far below 0 (pytorch/pytorch, issue 196678).
    """
    if not (q.is_cuda and torch.is_grad_enabled()):
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
