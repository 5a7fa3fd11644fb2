"""A model over several processes: sharded by FSDP2, cut by tensor parallelism, its experts shared out."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from core.compat import foreach_norms
from core.errors import require
from lightning_modules.config import ModelConfig
from lightning_modules.layers.moe import MoE
from lightning_modules.tensor_parallel import apply_tensor_parallel
from lightning_modules.trunk import Block, Trunk


def check_mesh(config: ModelConfig, data: int, tensor: int) -> None:
    """Hold the model against the processes that are to share it.

    Args:
        config: the model's.
        data, tensor: numbers of data- and tensor-parallel processes.

    Raises:
        ConfigError: something cannot be divided by the number of those who are to divide it.
    """
    experts = config.moe.expert_parallel
    valid = f"1 or all {data} data-parallel processes"
    require(experts in (1, data), "model.moe.expert_parallel", experts, valid)
    widths = {"model.num_kv_heads": config.kv_heads, "model.ffn_dim": config.hidden_dim}
    if config.ffn == "moe":
        widths["model.moe.shared_expert_dim"] = config.shared_expert_hidden_dim
    for name, width in widths.items():
        valid = f"a divisor of {name}={width}"
        require(width % tensor == 0, "trainer.strategy.tensor_parallel_size", tensor, valid)


def check_unsharded(config: ModelConfig) -> None:
    """Refuse a model that cannot be held whole by each of several processes.

    Raises:
        ConfigError: its experts are to be shared out.
    """
    experts = config.moe.expert_parallel
    require(experts == 1, "model.moe.expert_parallel", experts, "1 unless trainer=fsdp: docs/scaling.md")


def shard_block(block: Block, mesh: DeviceMesh, precision: MixedPrecisionPolicy | None = None) -> None:
    """Shard a block in place: all processes hold the same weights before, and their part of each after.

    Its attention and dense FFN are cut over the tensor-parallel processes, its experts shared out over the
    data-parallel ones if the configuration says so, and all else sharded over the latter.

    Args:
        mesh: of the dimensions data_parallel and tensor_parallel, as check_mesh has approved it.
        precision: what its weights are gathered in, and their gradients added up; None: in their own type.
    """
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if tensor.size() > 1:
        apply_tensor_parallel(block, tensor)
    shared_out: set[nn.Parameter] = set()
    if isinstance(block.ffn, MoE) and block.ffn.config.moe.expert_parallel > 1:
        block.ffn.shard_experts(data)
        mlp = block.ffn.experts.mlp
        shared_out = {mlp.w1, mlp.v1, mlp.w2}
    fully_shard(block, mesh=data, mp_policy=precision or MixedPrecisionPolicy(), ignored_params=shared_out)


def shard_rest(model: Trunk, mesh: DeviceMesh) -> None:
    """Shard what is outside of the blocks: embedding and head. `shard_block` comes first.

    Args:
        mesh: the blocks'.
    """
    experts = {p for mixture in model.mixtures().values() for p in mixture.experts.parameters()}
    shared_out = experts if model.config.moe.expert_parallel > 1 else set()
    fully_shard(model, mesh=mesh["data_parallel"], ignored_params=shared_out)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the l2 norm over all gradients of the parameters, the parts in other processes included."""
    norms = [_total_norm([p.grad for p in group if p.grad is not None]) for group in _by_mesh(parameters)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the l2 norm over all of them in fp32 or wider; torch's own comes in the gradients' type."""
    if all(gradient.dtype in (torch.float32, torch.float64) for gradient in gradients):
        return get_total_norm(gradients)
    return torch.linalg.vector_norm(foreach_norms(gradients, torch.float32))


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Clip the parameters' gradients in place, to an l2 norm over all of them of at most max_norm."""
    groups = _by_mesh(parameters)
    norm = gradient_norm(p for group in groups for p in group)
    for group in groups:
        clip_grads_with_norm_(group, max_norm, norm)


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return those with a gradient: tensor parallelism leaves tensors on different meshes, which no operator mixes."""
    groups: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())
