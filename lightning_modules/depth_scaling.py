"""Scales residual branches, initialization and AdamW's epsilon with depth, so that a rate tuned shallow serves deep.

With m_L = model.num_layers / optim.base_num_layers, and m_N the width's ratio (1 without optim.width_scaling),
CompleteP (2505.01618, table 1 and equation 40, at alpha = 1) is

                                              branches   epsilon        init
    matrices of blocks                        1/m_L      1/(m_N m_L)    of the base depth
    norm gains, biases, gates of blocks                  1/(m_N m_L)
    embedding, head, final norm                          1/m_N          of the base depth

Rates and decay have no factor for depth: that of rates is m_L^(alpha - 1), which is 1. By width they are what
optim.width_scaling makes them. Every block adds 1/m_L of what its sublayers put out, so that all together add as much
at any depth, and each learns as much as at the base depth. The init is told the base depth: one that shrinks with
depth itself would count it twice.

The rules are AdamW's. Steps of Lion and Muon, too, do not shrink with the gradient that the factor makes smaller; that
the same serves them is derived here, not published. They make sense where a branch is added to the stream as it is,
x + f(N x): behind a norm the factor would come to nothing. With several streams, R_i + s_i f(x) (ihc, gr), s and what
makes x are of the branch: a step changes each by the rate, and the stream by 1/m_L of it. That is derived here too.
Where a learned matrix or number multiplies the streams themselves (res of hc and mhc, GPAS), a step of the rate in
every block changes the product of all by more the more there are, and no factor on branches bounds it.
"""

from dataclasses import dataclass

from core.errors import require
from lightning_modules.argument_errors import as_config_errors
from lightning_modules.config import ModelConfig, OptimConfig
from lightning_modules.width_scaling import KNOWN, width_scaling
from spannorm import PLACEMENTS, find_placement


@dataclass(frozen=True)
class DepthScaling:
    """The factors above, for one model.

    Attributes:
        kind: none or completep.
        ratio: m_L; 1 without scaling.
        width: m_N; likewise.
        num_layers: the number of blocks that the init is asked for.
    """

    kind: str
    ratio: float
    width: float
    num_layers: int

    @property
    def branch_multiplier(self) -> float:
        """Return what attention's and the FFN's output is multiplied by."""
        return 1 / self.ratio

    def eps_factor(self, outside: bool) -> float:
        """Return the factor on optim.eps.

        Args:
            outside: whether it is embedding, head or final norm, rather than of a block.
        """
        return 1 / self.width if outside else 1 / (self.width * self.ratio)


def depth_scaling(model: ModelConfig, optim: OptimConfig) -> DepthScaling:
    """Return the scaling that a configuration asks for.

    Raises:
        ConfigError: an optimizer of the user's own, or a placement whose branches are not added as they are, or that
            multiplies its streams.
    """
    if optim.depth_scaling == "none":
        return DepthScaling("none", 1.0, 1.0, model.num_layers)
    valid = f"none with optim.optimizer={optim.optimizer}: the rules are those of {', '.join(KNOWN)}"
    require(optim.optimizer in KNOWN, "optim.depth_scaling", optim.depth_scaling, valid)
    plain = ", ".join(sorted(name for name, placement in PLACEMENTS.items() if placement.plain_branches))
    with as_config_errors("model"):
        scheme = find_placement(model.placement)
    reason = f"branches are added as they are, to streams that nothing learned multiplies, under {plain}"
    gpas = bool(model.placement_options.get("gpas", False))
    of_what = f"model.placement={model.placement}" + (" and model.placement_options.gpas=true" if gpas else "")
    valid = f"none with {of_what}: {reason}" + (" without gpas" if gpas else "")
    require(scheme.plain_branches and not gpas, "optim.depth_scaling", optim.depth_scaling, valid)
    widths = width_scaling(model, optim)
    width = 1.0 if widths.kind == "none" else widths.dim
    ratio = model.num_layers / optim.base_num_layers
    return DepthScaling(optim.depth_scaling, ratio, width, optim.base_num_layers)
