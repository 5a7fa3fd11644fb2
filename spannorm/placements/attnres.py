"""Attention residuals (2603.15031): a sublayer reads a weighted mean of what all sublayers before it have put out."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spannorm.errors import InvalidArgument
from spannorm.matrices import Matrix
from spannorm.norms import NORMS, NormFactory
from spannorm.placements.base import Depth, Placement, Sublayer
from spannorm.precision import at_least_fp32, without_autocast

Sources = tuple[Tensor, ...]
"""The embedding output, then what sublayers have put out, or sums of that; each [batch, seq, dim]."""


class SourceAttention(nn.Module):
    """sum_i a_i v_i with a = softmax_i(w . N(v_i)): attention over the sources, for each token by itself.

    w is a learned vector, 0 at the start, where this is the plain mean; as a matrix of one row it has the role
    `residual`. N is an RMSNorm with a gain, whatever the kind of the model's norms. The weights are computed in fp32 or
    wider under any precision.

    Args:
        dim: number of features.
        eps: of N.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, dim))
        self.weight = nn.Parameter(torch.ones(dim))  # N's gain
        self.eps = eps

    def forward(self, sources: Sources) -> Tensor:
        """Return the weighted mean of the sources, of their shape and dtype."""
        if torch.compiler.is_compiling():
            return self.mean(self.query, self.weight, *sources)
        mean: Tensor = _Recomputed.apply(self.mean, self.query, self.weight, *sources)
        return mean

    def weights(self, sources: Sources) -> Tensor:
        """Return the weight of each source, [sources, batch, seq]; they are positive, and their sum is 1."""
        return self._weights(self.query, self.weight, *sources)

    def mean(self, query: Tensor, gain: Tensor, *sources: Tensor) -> Tensor:
        """Return the weighted mean of the sources for a query [1, dim] and a gain [dim], by operators of torch."""
        weights = self._weights(query, gain, *sources).unsqueeze(-1)
        mean = weights[0] * sources[0]
        for weight, source in zip(weights[1:], sources[1:], strict=True):
            mean = torch.addcmul(mean, weight, source.to(mean.dtype))
        return mean.to(sources[0].dtype)

    def matrices(self) -> Iterator[Matrix]:
        """Yield w."""
        yield Matrix("residual", self.query, self.query.size(1), 1, std=0.0)

    def _weights(self, query: Tensor, gain: Tensor, *sources: Tensor) -> Tensor:
        with without_autocast(query):
            direction = at_least_fp32(query[0]) * at_least_fp32(gain)
            keys = [at_least_fp32(source) for source in sources]
            inverses = [(key.square().mean(-1) + self.eps).rsqrt() for key in keys]
            # Row by row, so that a token's weights are the same to the bit whatever tokens are beside it.
            logits = [torch.linalg.vecdot(key, direction) * i for key, i in zip(keys, inverses, strict=True)]
            return torch.stack(logits, dim=-1).softmax(-1).movedim(-1, 0)


class _Recomputed(torch.autograd.Function):
    """A function of tensors that keeps nothing but its arguments for the backward pass.

    What lies between sources and mean would take the memory of all sources once more for each reader.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # the gradients will be differentiated in turn
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            # Views, as an argument may depend on another one, whose gradient would then be in its own already.
            tensors = [
                t.view_as(t) if again else t.detach().requires_grad_(n)
                for t, n in zip(ctx.saved_tensors, needed, strict=True)
            ]
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            made = iter(torch.autograd.grad(ctx.function(*tensors), wanted, grad, create_graph=again))
        return None, *(next(made) if need else None for need in needed)


class AttnRes(Placement):
    """h = sum_i a_i v_i, a = softmax_i(w . N v_i);  v <- (v, f(N h)) for f = A, then F;  out = N(h).   2603.15031

    v_0 ─┬─────────────────────┬───────────── ...
         └─ Σ ─ N ─ A ─ v_1 ─┬─│───────────── ...       Σ: w and a gain of its own each time
                             └─┴─ Σ ─ N ─ F ─ ...

    Args:
        group: outputs of so many sublayers in turn are added up and make one source; a sublayer amid a group reads the
            sum so far as a source of its own. 1: every output is one (full attention residuals).
    """

    has_final_norm = True
    default_init = "megatron"
    norms = tuple(kind for kind in NORMS if kind != "none")  # nothing else makes up for a mean that shrinks with depth
    state_grows = True

    def __init__(self, depth: Depth, norm: NormFactory, final_norm: bool | None = None, group: int = 1) -> None:
        super().__init__(depth, norm, final_norm)
        if group < 1:
            raise InvalidArgument("group", group, "an integer >= 1")
        first = 2 * (depth.index - 1)
        self.begins_group = first % group == 0, (first + 1) % group == 0
        # The embedding is all that the first sublayer can read.
        self.read_attn = None if depth.is_first else SourceAttention(norm.dim, norm.eps)
        self.read_ffn = SourceAttention(norm.dim, norm.eps)
        self.read_out = SourceAttention(norm.dim, norm.eps) if depth.is_last else None
        self.norm_attn = norm(before_attention=True)
        self.norm_ffn = norm()

    def enter(self, h: Tensor) -> Sources:
        return (h,)

    def forward(self, state: Sources, attn: Sublayer, ffn: Sublayer) -> Sources:
        h = state[0] if self.read_attn is None else self.read_attn(state)
        state = self._add(state, attn(self.norm_attn(h)), self.begins_group[0])
        return self._add(state, ffn(self.norm_ffn(self.read_ffn(state))), self.begins_group[1])

    def leave(self, state: Sources) -> Tensor:
        assert self.read_out is not None
        return self.final_norm(self.read_out(state))

    def _add(self, sources: Sources, out: Tensor, begins: bool) -> Sources:
        out = out.to(sources[0].dtype)
        return (*sources, out) if begins else (*sources[:-1], sources[-1] + out)

    def hidden(self, state: Sources) -> Tensor:
        """Return the mean of the sources, which is what a sublayer without a preference reads."""
        return torch.stack(state).mean(0)

    def readers(self) -> dict[str, nn.Module]:
        named = {"attn": self.read_attn, "ffn": self.read_ffn, "out": self.read_out}
        return {name: reader for name, reader in named.items() if reader is not None}
