"""Faster ways through a training step on a CPU, behind one switch: `model.cpu_kernels`.

    auto    each is used where it applies: fp32 or wider, with gradients, on a CPU
    off     torch's own operators alone, on every processor

| file | in the place of | what it saves |
|---|---|---|
| linear.py | `nn.Linear` | on AMD, MKL's way through products of 10^8 multiplications and more: oneDNN's is shorter |
| rms_norm.py | `spannorm.RMSNorm` | most of a dozen passes over memory, and x / rms kept for the backward pass |
| allocator.py | handing memory back | new pages, and their zeros, for what the step before has freed |
| expert_swiglu.py | the experts' SwiGLU | passes over gate and up, which are in the cache an expert at a time |

docs/decisions.md has what each brings by itself; what brings less than 2 % of a step is not kept. The layers are plain
PyTorch and know nothing of this: `use_cpu_kernels` exchanges the classes of modules for subclasses that differ in
their forward alone, so parameters, their names and checkpoints are the same. `keep_freed_memory` is the process' own.
"""

from torch import nn

from lightning_modules.layers.cpu_kernels.expert_swiglu import ExpertMLP
from lightning_modules.layers.cpu_kernels.linear import Linear
from lightning_modules.layers.cpu_kernels.rms_norm import RMSNorm

KERNELS: dict[type[nn.Module], type[nn.Module]] = {cls.__mro__[1]: cls for cls in (ExpertMLP, Linear, RMSNorm)}
"""The faster subclass of each class of a layer."""


def use_cpu_kernels(module: nn.Module) -> None:
    """Let a module, and all that it is made of, compute by the kernels of this folder, in place.

    A subclass of a layer stays as it is: whoever wrote it has changed something.
    """
    for part in module.modules():
        if type(part) in KERNELS:
            part.__class__ = KERNELS[type(part)]
