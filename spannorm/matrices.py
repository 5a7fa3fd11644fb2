"""Tells an initialization what it needs of a weight matrix: its role, fan-in, fan-out, and the weight itself."""

from typing import Literal, NamedTuple, get_args

from torch import Tensor

Role = Literal["embedding", "head", "query", "key", "value", "attn_out", "ffn_up", "ffn_down", "router"]
"""What a matrix does in a transformer. `ffn_up` covers the gate and up projections, dense or expert; `attn_out` and
`ffn_down` end a residual branch; `router` gives the logits that choose a token's experts."""

ROLES: tuple[Role, ...] = get_args(Role)


class Matrix(NamedTuple):
    """Describes one weight matrix.

    Attributes:
        role: what the matrix does in the transformer.
        weight: the parameter, [outputs, inputs]; experts' may be stacked, [num_experts x hidden, dim].
        fan_in: number of inputs summed into one output (a fraction where width scaling refers to another width).
        fan_out: number of outputs, likewise.
        width_is_explicit: whether its hidden width (ffn_up's outputs, ffn_down's inputs) is given by the user rather
            than derived from the model's width, which matters to rules that scale with width.
    """

    role: Role
    weight: Tensor
    fan_in: float
    fan_out: float
    width_is_explicit: bool = False
