"""The routed experts, by any of the backends. All compute the same, from parameters of the same names and shapes.

backend      how                                       where auto takes it
megablocks   the package's grouped dMoE (2211.15841)   CUDA in bf16, where it is installed: docs/megablocks.md
grouped      F.grouped_mm                              CUDA otherwise
loop         a matrix product per expert               CPU
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from core.errors import ConfigError, suggest
from lightning_modules.config import ModelConfig
from lightning_modules.layers import expert_parallel, megablocks
from lightning_modules.layers.expert_products import GROUPED, LOOP, Products
from lightning_modules.layers.norms import make_norm

PRODUCTS: dict[str, Products] = {"loop": LOOP, "grouped": GROUPED}


class Backend(NamedTuple):
    """A way to compute the experts, and why it was chosen.

    Attributes:
        name: megablocks, grouped or loop.
        reason: why this one.
    """

    name: str
    reason: str


class ExpertMLP(nn.Module):
    """Weights of all experts, stacked: w1 (gate), v1 (up) and w2 (down), each [num_experts x hidden, dim]."""

    def __init__(self, config: ModelConfig, inner_norm: bool, backend: str) -> None:
        super().__init__()
        self.backend = backend  # by name: operators cannot be copied or pickled, and a module must
        self.hidden_dim = config.expert_hidden_dim
        shape = (config.moe.num_experts * self.hidden_dim, config.dim)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.v1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))
        self.inner_norm = make_norm(config, self.hidden_dim) if inner_norm else nn.Identity()
        self.group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Return the experts' outputs for x [assignments, dim], sorted by expert: [assignments, dim]."""
        if torch.is_autocast_enabled(x.device.type):  # which does not know the operators of expert_products
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.group is None:
            return self._run(x, tokens_per_expert)
        return expert_parallel.exchange(self._run, x, tokens_per_expert, self.group)

    def products(self) -> Products:
        """Return how the backend multiplies rows with their experts' matrices."""
        return PRODUCTS[self.backend]

    def _run(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        weights = (expert_parallel.local(weight) for weight in (self.w1, self.v1, self.w2))
        w1, v1, w2 = (weight.to(x.dtype).unflatten(0, (-1, self.hidden_dim)) for weight in weights)
        products = self.products()
        hidden = self.inner_norm(products.swiglu(x, w1, v1, tokens_per_expert))
        # Some norms give fp32 under autocast.
        return products.matmul(hidden.to(x.dtype), w2, tokens_per_expert, False)


class Experts(nn.Module):
    """Sorts tokens by expert, runs the experts, and adds up each token's weighted outputs."""

    def __init__(self, config: ModelConfig, inner_norm: bool, backend: str) -> None:
        super().__init__()
        self.top_k = config.moe.top_k
        self.mlp = ExpertMLP(config, inner_norm, backend)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Return weighted sums [tokens, dim] for x [tokens, dim], weights and experts [tokens, k]; none is dropped."""
        order = experts.flatten().argsort(stable=True)
        tokens = order // self.top_k
        out = self.mlp(x.index_select(0, tokens), tokens_per_expert)
        # Weighted in fp32 and only then cast, as by MegaBlocks where autocast has not cast the weights to bf16 before.
        out = (out * weights.flatten().index_select(0, order).unsqueeze(-1)).to(x.dtype)
        return torch.zeros_like(x).index_add_(0, tokens, out)

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep this process's experts only, and send tokens to those of the others.

        Args:
            mesh: processes with the same weights, of one dimension; see expert_parallel.
        """
        expert_parallel.shard(self.mlp, mesh)
        self.mlp.group = mesh.get_group()


def choose_backend(config: ModelConfig, inner_norm: bool = False) -> Backend:
    """Resolve `model.moe.backend` for torch's default device, and the autocast or default dtype in force.

    A weightless model on the meta device may still come to life anywhere: there, only what no device and no precision
    could make possible is refused.

    Raises:
        ConfigError: it names no backend, or one that cannot be had here.
    """
    device = torch.get_default_device()
    name, obstacles = config.moe.backend, _obstacles(config, inner_norm, device)
    if name == "auto":
        if device.type != "cuda":
            return Backend("loop", f"runs on {device.type}")
        if obstacles["grouped"] is not None:
            return Backend("loop", f"grouped {obstacles['grouped']}")
        obstacle = obstacles["megablocks"]
        return Backend("grouped", f"megablocks {obstacle}") if obstacle else Backend("megablocks", "CUDA in bf16")
    if name not in obstacles:
        raise ConfigError("model.moe.backend", name, suggest(name, [*obstacles, "auto"]))
    if obstacles[name] is not None:
        raise ConfigError("model.moe.backend", name, f"auto or another one: {name} {obstacles[name]}")
    return Backend(name, "as configured")


def _obstacles(config: ModelConfig, inner_norm: bool, device: torch.device) -> dict[str, str | None]:
    """Return, by backend, what keeps it from computing this layer there."""
    dtype = _dtype(device)
    widths = (config.dim, config.expert_hidden_dim)
    unaligned = f"needs widths in multiples of 8, not {widths}" if any(width % 8 for width in widths) else None
    inner = "has no norm inside its experts, which the placement asks for" if inner_norm else None
    double = "does not compute in float64" if dtype == torch.float64 else None
    return {
        "megablocks": megablocks.obstacle(config, device, dtype) or inner or unaligned,
        "grouped": unaligned or double,
        "loop": None,
    }


def _dtype(device: torch.device) -> torch.dtype | None:
    """Return what the experts' products will be computed in; None: not known yet."""
    if device.type == "meta":
        return None
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.get_default_dtype()


def make_experts(config: ModelConfig, inner_norm: bool, backend: str) -> Experts:
    """Return the routed experts by the backend of that name."""
    if backend == "megablocks":
        return megablocks.make_experts(config)
    return Experts(config, inner_norm, backend)
