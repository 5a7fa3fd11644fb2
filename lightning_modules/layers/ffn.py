"""Dense feed-forward layers: SwiGLU (2002.05202), and the MLP of the first transformers with GELU (1606.08415)."""

from collections.abc import Iterator
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.config import ModelConfig
from lightning_modules.layers.norms import make_norm, norm_matrices
from spannorm import Matrix


def linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """Return a layer whose bias, if it has one, starts at 0."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class DenseFFN(nn.Module):
    """The base of dense layers: down(norm(hidden x)); a subclass says what is hidden.

    Args:
        config: dim, width of the hidden layer, biases and norm kind.
        inner_norm: one norm before the output projection (2210.06423).

    Attributes:
        gated: whether there is a second projection up, gate_proj.
    """

    gated: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, inner_norm: bool = False) -> None:
        super().__init__()
        self.width_is_explicit = config.ffn_dim is not None
        if self.gated:
            self.gate_proj = linear(config.dim, config.hidden_dim, config.bias)
        self.up_proj = linear(config.dim, config.hidden_dim, config.bias)
        self.down_proj = linear(config.hidden_dim, config.dim, config.bias)
        self.inner_norm = make_norm(config, config.hidden_dim) if inner_norm else nn.Identity()

    def hidden(self, x: Tensor) -> Tensor:
        """Return the hidden layer, [batch, seq, hidden_dim]."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, report: bool = True) -> tuple[Tensor, None]:
        """Return (output of x's shape [batch, seq, dim], None: a dense layer has no router statistics to report)."""
        return self.down_proj(self.inner_norm(self.hidden(x))), None

    def matrices(self) -> Iterator[Matrix]:
        dim, hidden = self.up_proj.in_features, self.up_proj.out_features
        for up in (self.gate_proj, self.up_proj) if self.gated else (self.up_proj,):
            yield Matrix("ffn_up", up.weight, dim, hidden, self.width_is_explicit)
        yield Matrix("ffn_down", self.down_proj.weight, hidden, dim, self.width_is_explicit)
        yield from norm_matrices(self, self.width_is_explicit, reads_hidden=True)


class FeedForward(DenseFFN):
    """down(silu(gate x) * up x)."""

    gated: ClassVar[bool] = True

    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class MLP(DenseFFN):
    """down(gelu(up x))."""

    def hidden(self, x: Tensor) -> Tensor:
        return F.gelu(self.up_proj(x))
