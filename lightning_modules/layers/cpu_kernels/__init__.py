"""Faster ways through a training step on a CPU, behind one switch: `model.cpu_kernels`.

    auto    each is used where it applies: fp32 or wider, with gradients, on a CPU
    off     torch's own operators alone, on every processor

| file | in the place of | what it saves |
|---|---|---|
| linear.py | `nn.Linear` | on AMD, MKL's way through products of 10^8 multiplications and more: oneDNN's is shorter |
| rms_norm.py | `spannorm.RMSNorm` | most of a dozen passes over memory, and x / rms kept for the backward pass |
| allocator.py | handing memory back | new pages, and their zeros, for what the step before has freed |
| source_attention.py | `spannorm.SourceAttention` | a second forward pass, and passes over gradients of the sources |
| expert_swiglu.py | the experts' SwiGLU | passes over gate and up, which are in the cache an expert at a time |

docs/decisions.md has what each brings by itself; what brings less than 2 % of a step is not kept. The layers are plain
PyTorch and know nothing of this: `use_cpu_kernels` exchanges the classes of modules for subclasses that differ in
their forward alone, so parameters, their names and checkpoints are the same. `keep_freed_memory` is the process' own.
"""

from lightning_modules.layers.cpu_kernels.switch import KERNELS, use_cpu_kernels

__all__ = ["KERNELS", "use_cpu_kernels"]
