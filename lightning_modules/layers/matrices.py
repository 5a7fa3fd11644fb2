"""What initialization and the optimizer need to know of a weight: its role, its fan-in, and the weight itself."""

from typing import Literal, NamedTuple

from torch import Tensor

Role = Literal["embedding", "head", "query", "key", "value", "attn_out", "ffn_up", "ffn_down", "router"]
"""ffn_up covers the gate and up projections, dense or expert; attn_out and ffn_down end a residual branch."""


class Matrix(NamedTuple):
    """One weight matrix, as its layer describes it.

    Attributes:
        role: what the matrix does in the transformer.
        weight: the parameter; experts' are stacked, [num_experts x hidden, dim].
        fan_in: number of inputs summed into one output (a fraction where width scaling refers to another width).
        fan_out: number of outputs, likewise.
        pinned: whether its hidden width (ffn_up's outputs, ffn_down's inputs) is given, not derived from model.dim.
    """

    role: Role
    weight: Tensor
    fan_in: float
    fan_out: float
    pinned: bool = False
