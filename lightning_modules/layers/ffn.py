"""Dense SwiGLU feed-forward layer (2002.05202)."""

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_modules.config import ModelConfig
from lightning_modules.layers.linear import Linear
from lightning_modules.layers.norms import make_norm
from lightning_modules.layers.swiglu import swiglu
from spannorm import Matrix


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), without biases.

    Args:
        config: dim, width of the hidden layer and norm kind.
        inner_norm: one norm before the output projection (2210.06423).
    """

    def __init__(self, config: ModelConfig, inner_norm: bool = False) -> None:
        super().__init__()
        self.width_is_explicit = config.ffn_dim is not None
        self.gate_proj = Linear(config.dim, config.hidden_dim)
        self.up_proj = Linear(config.dim, config.hidden_dim)
        self.down_proj = Linear(config.hidden_dim, config.dim)
        self.inner_norm = make_norm(config, config.hidden_dim) if inner_norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [batch, seq, dim] -> (output of the same shape, None: a dense layer has no router statistics)."""
        return self.down_proj(self.inner_norm(swiglu(self.gate_proj(x), self.up_proj(x)))), None

    def matrices(self) -> Iterator[Matrix]:
        dim, hidden = self.gate_proj.in_features, self.gate_proj.out_features
        yield Matrix("ffn_up", self.gate_proj.weight, dim, hidden, self.width_is_explicit)
        yield Matrix("ffn_up", self.up_proj.weight, dim, hidden, self.width_is_explicit)
        yield Matrix("ffn_down", self.down_proj.weight, hidden, dim, self.width_is_explicit)
