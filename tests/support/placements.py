"""Placements by themselves: through a model's blocks alone, and their norms written out."""

from collections.abc import Callable

from torch import Tensor, nn

from lightning_modules.layers.rope import rope_tables
from lightning_modules.transformer import Transformer
from tests.support import reference

EPS = 1e-5


def through(model: Transformer, h: Tensor) -> Tensor:
    """Embedding output [batch, seq, dim] -> what the head reads."""
    rope = rope_tables(h.size(1), model.config.head_width, model.config.rope_theta, h.device)
    for block in model.blocks:
        h, _ = block(h, rope)
    return h


def norms_of(module: nn.Module, eps: float = EPS) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every norm of a module by its name, written out from its gain and, where it has one, its bias."""
    parameters = dict(module.named_parameters())

    def written_out(gain: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        if bias is None:
            return lambda x: reference.rms_norm(x, gain, eps)
        return lambda x: reference.rms_norm(x - x.mean(dim=-1, keepdim=True), gain, eps) + bias

    return {
        name.removesuffix(".weight"): written_out(gain, parameters.get(name.replace(".weight", ".bias")))
        for name, gain in parameters.items()
        if gain.dim() == 1 and name.endswith(".weight")
    }
