"""Tells an initialization what it needs of a weight matrix: its role, fan-in, fan-out, and the weight itself."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

from torch import Tensor, nn

Role = Literal["embedding", "head", "query", "key", "value", "attn_out", "ffn_up", "ffn_down", "router", "residual"]
"""What a matrix does in a transformer. `ffn_up` covers the gate and up projections, dense or expert; `attn_out` and
`ffn_down` end a residual branch; `router` gives the logits that choose a token's experts; `residual` is any matrix of a
placement or a norm: it mixes, weighs or gates streams."""

ROLES: tuple[Role, ...] = get_args(Role)


class Matrix(NamedTuple):
    """Describes one weight matrix.

    Attributes:
        role: what the matrix does in the transformer.
        weight: the parameter, [outputs, inputs]; experts' may be stacked, [num_experts x hidden, dim].
        fan_in: number of inputs summed into one output (a fraction where width scaling refers to another width).
        fan_out: number of outputs, likewise.
        width_is_explicit: whether its hidden width (ffn_up's outputs, ffn_down's and residual's inputs) is given by the
            user rather than derived from the model's width, which matters to rules that scale with width. Of an
            embedding: whether it multiplies, as that of patches does, rather than being looked up or a head as well.
        std: the standard deviation that it starts with whatever the init and the width; 0: it starts at zero; None: the
            init decides.
        reads_hidden: whether a matrix of the role residual reads the hidden layer of an FFN, rather than the stream.
    """

    role: Role
    weight: Tensor
    fan_in: float
    fan_out: float
    width_is_explicit: bool = False
    std: float | None = None
    reads_hidden: bool = False


@runtime_checkable
class OwnsMatrices(Protocol):
    """A part of a placement, such as a norm, that has matrices: it needs to derive from nothing here."""

    def matrices(self) -> Iterator[Matrix]:
        """Yield each matrix once, with the role `residual`."""


def owned_matrices(module: nn.Module) -> Iterator[Matrix]:
    """Yield the matrices of a module's parts, at any depth, that say by a method `matrices` which they have."""
    for part in module.children():
        yield from part.matrices() if isinstance(part, OwnsMatrices) else owned_matrices(part)
