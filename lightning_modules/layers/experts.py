"""Ways to run the experts on tokens sorted by expert. All compute the same; see docs/decisions.md for when which."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ConfigError, suggest

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, nn.Module], Tensor]
"""(x [N, dim], w1, v1, w2 [experts, hidden, dim], tokens_per_expert [experts], inner norm) -> [N, dim]."""


@torch.compiler.disable  # the split sizes are data: compile around the experts, not through them
def run_loop(x: Tensor, w1: Tensor, v1: Tensor, w2: Tensor, tokens_per_expert: Tensor, inner: nn.Module) -> Tensor:
    """One pair of matrix products per expert over its contiguous slice. The fastest on a CPU."""
    chunks = x.split(tokens_per_expert.long().tolist())
    # Every expert is called, also on no tokens: under FSDP all ranks must take part in the same gradients.
    outputs = [
        F.linear(inner(F.silu(F.linear(chunk, gate)) * F.linear(chunk, up)), down.t())
        for chunk, gate, up, down in zip(chunks, w1.unbind(), v1.unbind(), w2.unbind(), strict=True)
    ]
    return torch.cat(outputs)


@torch.compiler.disable  # grouped_mm in fp32 does not trace
def run_grouped(x: Tensor, w1: Tensor, v1: Tensor, w2: Tensor, tokens_per_expert: Tensor, inner: nn.Module) -> Tensor:
    """One grouped matrix product per projection; no host synchronization."""
    if torch.is_autocast_enabled(x.device.type):  # grouped_mm ignores autocast
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1, v1, w2 = (tensor.to(dtype) for tensor in (x, w1, v1, w2))
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    gate = F.grouped_mm(x, w1.transpose(1, 2), offs=ends)
    up = F.grouped_mm(x, v1.transpose(1, 2), offs=ends)
    return F.grouped_mm(inner(F.silu(gate) * up), w2, offs=ends)


BACKENDS: dict[str, Backend] = {"loop": run_loop, "grouped": run_grouped}


def choose_backend(name: str) -> str:
    """Resolve `auto`, and refuse what does not exist.

    Raises:
        ConfigError: `name` is neither auto nor a backend.
    """
    if name == "auto":
        return "grouped" if torch.cuda.is_available() else "loop"
    if name not in BACKENDS:
        raise ConfigError("model.moe.backend", name, suggest(name, [*BACKENDS, "auto"]))
    return name
