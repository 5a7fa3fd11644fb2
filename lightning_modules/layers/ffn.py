"""Dense feed-forward layers: SwiGLU (2002.05202), and the MLP of the first transformers with GELU (1606.08415)."""

from collections.abc import Iterator

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


class FeedForward(nn.Module):
    """down(silu(gate x) * up x).

    Args:
        config: dim, width of the hidden layer, biases and norm kind.
        inner_norm: one norm before the output projection (2210.06423).
    """

    def __init__(self, config: ModelConfig, inner_norm: bool = False) -> None:
        super().__init__()
        self.width_is_explicit = config.ffn_dim is not None
        self.gate_proj = linear(config.dim, config.hidden_dim, config.bias)
        self.up_proj = linear(config.dim, config.hidden_dim, config.bias)
        self.down_proj = linear(config.hidden_dim, config.dim, config.bias)
        self.inner_norm = make_norm(config, config.hidden_dim) if inner_norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return (output of x's shape [batch, seq, dim], None: a dense layer has no router statistics)."""
        return self.down_proj(self.inner_norm(F.silu(self.gate_proj(x)) * self.up_proj(x))), None

    def matrices(self) -> Iterator[Matrix]:
        dim, hidden = self.gate_proj.in_features, self.gate_proj.out_features
        yield Matrix("ffn_up", self.gate_proj.weight, dim, hidden, self.width_is_explicit)
        yield Matrix("ffn_up", self.up_proj.weight, dim, hidden, self.width_is_explicit)
        yield Matrix("ffn_down", self.down_proj.weight, hidden, dim, self.width_is_explicit)
        yield from norm_matrices(self, self.width_is_explicit, reads_hidden=True)


class MLP(nn.Module):
    """down(gelu(up x)).

    Args:
        config: dim, width of the hidden layer, biases and norm kind.
        inner_norm: one norm before the output projection (2210.06423).
    """

    def __init__(self, config: ModelConfig, inner_norm: bool = False) -> None:
        super().__init__()
        self.width_is_explicit = config.ffn_dim is not None
        self.up_proj = linear(config.dim, config.hidden_dim, config.bias)
        self.down_proj = linear(config.hidden_dim, config.dim, config.bias)
        self.inner_norm = make_norm(config, config.hidden_dim) if inner_norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return (output of x's shape [batch, seq, dim], None: a dense layer has no router statistics)."""
        return self.down_proj(self.inner_norm(F.gelu(self.up_proj(x)))), None

    def matrices(self) -> Iterator[Matrix]:
        dim, hidden = self.up_proj.in_features, self.up_proj.out_features
        yield Matrix("ffn_up", self.up_proj.weight, dim, hidden, self.width_is_explicit)
        yield Matrix("ffn_down", self.down_proj.weight, hidden, dim, self.width_is_explicit)
        yield from norm_matrices(self, self.width_is_explicit, reads_hidden=True)
