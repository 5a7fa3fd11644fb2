"""Exchanges the classes of layers for faster ones."""

from torch import nn

from lightning_modules.layers.cpu_kernels.expert_swiglu import ExpertMLP
from lightning_modules.layers.cpu_kernels.linear import Linear
from lightning_modules.layers.cpu_kernels.rms_norm import RMSNorm
from lightning_modules.layers.cpu_kernels.source_attention import SourceAttention

KERNELS: dict[type[nn.Module], type[nn.Module]] = {
    cls.__mro__[1]: cls for cls in (ExpertMLP, Linear, RMSNorm, SourceAttention)
}
"""The faster subclass of each class of a layer."""


def use_cpu_kernels(module: nn.Module) -> None:
    """Let a module, and all that it is made of, compute by the kernels of this folder, in place.

    A subclass of a layer stays as it is: whoever wrote it has changed something.
    """
    for part in module.modules():
        if type(part) in KERNELS:
            part.__class__ = KERNELS[type(part)]
