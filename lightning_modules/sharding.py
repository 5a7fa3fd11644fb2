"""A model over several processes: parameters sharded by FSDP2, experts shared out."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from core.errors import require
from lightning_modules.transformer import Transformer


def shard(model: Transformer, mesh: DeviceMesh) -> None:
    """In place; all processes hold the same weights before, and their part of each after.

    Args:
        model: built and initialized; its `model.moe.expert_parallel` says whether experts stay where they are and
            tokens travel, or tokens stay and experts are gathered like all other parameters.
        mesh: the data-parallel processes, of one dimension.

    Raises:
        ConfigError: experts are to be shared out over some of the processes only.
    """
    size = model.config.moe.expert_parallel
    valid = f"1 or all {mesh.size()} data-parallel processes"
    require(size in (1, mesh.size()), "model.moe.expert_parallel", size, valid)
    shared_out = set()
    for mixture in model.mixtures().values() if size > 1 else ():
        mixture.shard_experts(mesh)
        mlp = mixture.experts.mlp
        shared_out |= {mlp.w1, mlp.v1, mlp.w2}
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=shared_out)
