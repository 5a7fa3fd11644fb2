"""Experts shared out over processes: tokens travel to the process that has their expert, and back (2006.16668).

The processes of a group have different tokens, and their losses are averaged, as in data parallelism. Each expert is in
one process, where its gradient is the sum over the losses of the group's n processes; so it is divided by n.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from core.compat import all_to_all_single_autograd, wait_tensor


def shard(mlp: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each process its experts of w1, v1 and w2, which become DTensors in place.

    Args:
        mlp: with the same weights [num_experts x hidden, dim] in every process.
        mesh: those processes, of one dimension.
    """
    for name in ("w1", "v1", "w2"):
        weight = distribute_tensor(mlp.get_parameter(name).detach(), mesh, [Shard(0)], src_data_rank=None)
        mlp.register_parameter(name, nn.Parameter(weight))


def local(weight: Tensor) -> Tensor:
    """Return this process's part of a weight that `shard` distributed, with the mean's gradient; else all of it."""
    if not isinstance(weight, DTensor):
        return weight
    part, size = weight.to_local(), weight.device_mesh.size()
    if part.requires_grad:
        part.register_hook(lambda grad: grad / size)
    return part


@torch.compiler.disable  # the sizes of what is sent are data
def exchange(
    run: Callable[[Tensor, Tensor], Tensor], x: Tensor, tokens_per_expert: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Call `run` on the tokens of all processes, each at the process that has its expert.

    Args:
        run: (x [rows, dim] sorted by expert, tokens_per_expert [local experts]) -> [rows, dim].
        x: [rows, dim], sorted by expert.
        tokens_per_expert: [num_experts], of this process.
        group: the processes that share out the experts, in rank order.

    Returns:
        [rows, dim], in the order of x.
    """
    counts = tokens_per_expert.long().view(group.size(), -1)
    received = torch.empty_like(counts)  # [sender, local expert]
    dist.all_to_all_single(received, counts, group=group)
    sent_sizes, received_sizes = torch.stack((counts, received)).sum(dim=2).tolist()

    rows = wait_tensor(all_to_all_single_autograd(x, received_sizes, sent_sizes, group))
    # They come by sender, and each sender's by expert.
    experts = torch.arange(received.size(1), device=x.device).repeat(group.size())
    order = experts.repeat_interleave(received.flatten(), output_size=len(rows)).argsort(stable=True)
    out = run(rows.index_select(0, order), received.sum(dim=0))
    out = out.index_select(0, order.argsort())  # index_copy would keep it for the backward pass
    return wait_tensor(all_to_all_single_autograd(out, sent_sizes, received_sizes, group))
