"""Scales initialization, learning rates and the output with width, so that a rate tuned small serves large.

With m = fan_in / (its value at the base width), against what the init and optim.lr give at the base width:

    scaling    matrices                std            learning rate   logits
    none       all                     the init's     1               1
    mup        hidden                  1/sqrt(m)      1/m             1/m       Tensor Programs V, table 8
               head                    1              1
               router                  1/m            1/m                       an output, without a multiplier
    standard   hidden, head, router    1/sqrt(m)      1/m             1         2407.05872, table 1, full alignment
    both       residual                1              1/m                       where the placement says the std

These are AdamW's rules, and Lion's, whose steps too are of one size in every entry. Muon's updates of hidden matrices
have a spectral norm that its scale gives, so their rate's factor is another one (lightning_modules/muon.py,
width_factor): 1 with scale=original and 1/sqrt(m) with match_rms_adamw, where all widths grow alike; what it leaves to
AdamW has AdamW's. Of any other optimizer no rule is known here.

Embedding, norm gains and biases keep both. Weight decay is multiplied by the inverse of the learning-rate factor: AdamW
shrinks weights by lr x weight_decay a step, and that product should not depend on width (2407.05872, section 3).
Hidden matrices are those of attention, dense FFN and experts, each with its own fan-in. That of a down matrix is a
hidden width. Where it is derived from model.dim, it grows in proportion, and m is that of model.dim. Where it is given
(model.ffn_dim, model.moe.expert_dim, model.moe.shared_expert_dim), it does not grow, and m is 1, unless
optim.base_ffn_width says what it was at the base width.

The matrices of placements and norms (residual) read as many features as the streams have, or fewer that grow in
proportion; where they read a number that the configuration gives, m is 1. Those of a norm over an FFN's hidden layer
have the m of its down matrix; of a norm over each head m is 1. The std that is said of one is for any width.

Widen a model by adding heads, not by widening them: the attention logits' scale is then untouched.
"""

from dataclasses import dataclass

from core.errors import require
from lightning_modules.config import ModelConfig, OptimConfig
from spannorm import Matrix


@dataclass(frozen=True)
class WidthScaling:
    """The factors above, for one model.

    Attributes:
        kind: none, mup or standard.
        dim: model.dim over optim.base_width.
        derived: a hidden width that is derived from model.dim, over its value at the base width.
        explicit: a hidden width that the configuration gives, over its value at the base width.
    """

    kind: str
    dim: float
    derived: float
    explicit: float

    @property
    def output_multiplier(self) -> float:
        """Return what the logits are multiplied by."""
        return 1 / self.dim if self.kind == "mup" else 1.0

    def ratio(self, matrix: Matrix) -> float:
        """Return m, the matrix' fan-in over that at the base width."""
        if self.kind == "none" or matrix.role == "embedding":
            return 1.0  # a lookup sums one row at any width
        if matrix.role == "residual":
            if matrix.reads_hidden:
                return self._hidden(matrix)
            return 1.0 if matrix.width_is_explicit else self.dim
        return self._hidden(matrix) if matrix.role == "ffn_down" else self.dim

    def _hidden(self, matrix: Matrix) -> float:
        return self.explicit if matrix.width_is_explicit else self.derived

    def at_base(self, matrix: Matrix) -> Matrix:
        """Return the matrix as the init would see it at the base width."""
        if self.kind == "none":
            return matrix
        # Scaled as the head that it also is; what reads a number of inputs that is given is no such one.
        tied = matrix.role == "embedding" and matrix.fan_in > 1 and not matrix.width_is_explicit
        fan_in = matrix.fan_in / (self.dim if tied else self.ratio(matrix))
        if matrix.role in ("head", "router", "residual"):  # their outputs (tokens, experts, coefficients) do not grow
            return matrix._replace(fan_in=fan_in)
        return matrix._replace(
            fan_in=fan_in, fan_out=matrix.fan_out / (self._hidden(matrix) if matrix.role == "ffn_up" else self.dim)
        )

    def std_factor(self, matrix: Matrix) -> float:
        """Return the factor on the standard deviation that the init gives at the base width, or the matrix itself."""
        if matrix.std is not None:
            return 1.0
        if self.kind == "mup" and matrix.role == "router":
            return 1 / self.ratio(matrix)
        if self.kind == "mup" and matrix.role == "head":
            return 1.0
        return self.ratio(matrix) ** -0.5

    def lr_factor(self, matrix: Matrix) -> float:
        """Return the factor on optim.lr for a matrix."""
        return 1.0 if self.kind == "mup" and matrix.role == "head" else 1 / self.ratio(matrix)


KNOWN = ("adamw", "lion", "muon")
"""The optimizers that there are rules for."""

UNSCALED = WidthScaling("none", 1.0, 1.0, 1.0)


def width_scaling(model: ModelConfig, optim: OptimConfig) -> WidthScaling:
    """Return the scaling that a configuration asks for.

    Raises:
        ConfigError: an optimizer of the user's own, standard scaling with tied embeddings, or one base_ffn_width for
            several hidden widths.
    """
    known = optim.width_scaling == "none" or optim.optimizer in KNOWN
    valid = f"none with optim.optimizer={optim.optimizer}: the rules are those of {', '.join(KNOWN)}"
    require(known, "optim.width_scaling", optim.width_scaling, valid)
    require(
        not (optim.width_scaling == "standard" and model.tie_embeddings),
        "model.tie_embeddings",
        True,
        "false with optim.width_scaling=standard: as an embedding the matrix keeps its scale, as a head it shrinks",
    )
    dim, widths = model.dim / optim.base_width, sorted(model.hidden_dims)
    if optim.base_ffn_width is None:
        return WidthScaling(optim.width_scaling, dim, derived=dim, explicit=1.0)
    valid = f"null where hidden widths differ: this model has {', '.join(map(str, widths))}"
    require(len(widths) == 1, "optim.base_ffn_width", optim.base_ffn_width, valid)
    hidden = widths[0] / optim.base_ffn_width
    return WidthScaling(optim.width_scaling, dim, derived=hidden, explicit=hidden)
