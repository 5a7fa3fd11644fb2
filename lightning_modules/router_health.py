"""Reports how the routers are doing, from the statistics that the MoE layers return.

| key | unit |
|---|---|
| moe/load_balancing_loss | unweighted; 1 is perfect balance; mean over layers |
| moe/z_loss | unweighted; mean over layers |
| moe/max_load | busiest expert's tokens over the mean; worst layer |
| moe/load_cv | coefficient of variation (standard deviation over mean) of the experts' tokens; worst layer |
| moe/dead_experts | number of experts that got no token; sum over layers |
| moe/entropy | of the router's distribution over experts, nats per token; mean over layers |
| moe/top1_margin | largest less second largest of that distribution; mean over layers |
| moe/logits_norm | l2 norm of the router's logits per token; mean over layers |

And each of them for one layer as moe/layer_NUMBER/NAME, layers counted from 1. All are over the batches and processes
of one optimizer step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_modules.layers.router import RouterStats

SCALARS = tuple(name for name in RouterStats._fields if name != "tokens_per_expert")
OVERALL: dict[str, Callable[[Tensor], Tensor]] = {
    "max_load": torch.max,
    "load_cv": torch.max,
    "dead_experts": torch.sum,
}
"""How the layers' values become one, where that is not their mean."""


def tally(stats: Sequence[RouterStats]) -> Tensor:
    """Return the layers' statistics as [layers, 1 + scalars + experts], to be summed over batches and processes.

    The first column counts what was summed.
    """
    one = torch.ones_like(stats[0].z_loss)
    rows = [
        torch.cat((torch.stack([one, *(getattr(s, name) for name in SCALARS)]), s.tokens_per_expert)) for s in stats
    ]
    return torch.stack(rows).detach()


def tokens_per_expert(tallied: Tensor) -> Tensor:
    """Return the tokens of each expert, [layers, experts], in a sum of tallies."""
    return tallied[:, 1 + len(SCALARS) :]


def router_health(tallied: Tensor, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return a sum of tallies as scalars by the keys above.

    Args:
        tallied: [layers, 1 + scalars + experts].
        layers: the number of each.
    """
    load = tokens_per_expert(tallied)
    means = tallied[:, 1 : 1 + len(SCALARS)] / tallied[:, :1]
    by_layer = {
        **dict(zip(SCALARS, means.unbind(dim=1), strict=True)),
        "max_load": load.amax(dim=1) / load.mean(dim=1),
        "load_cv": load.std(dim=1, correction=0) / load.mean(dim=1),
        "dead_experts": (load == 0).sum(dim=1).to(load.dtype),
    }
    health = {f"moe/{name}": OVERALL.get(name, torch.mean)(values) for name, values in by_layer.items()}
    for name, values in by_layer.items():
        health.update((f"moe/layer_{layer}/{name}", value) for layer, value in zip(layers, values, strict=True))
    return health
