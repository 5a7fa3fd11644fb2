"""Places the norms of a transformer block, and starts its matrices, in models of your own.

    from spannorm import Depth, NormFactory, SpanNorm, initialize, scale_init

    block = SpanNorm(Depth(index, total), NormFactory("rmsnorm", dim))
    x = block(x, my_attention, my_ffn)

A placement is the equation of one block around an attention and a feed-forward layer that may be anything; a norm kind
says what each of its norms is; an init gives every matrix its standard deviation by its role. torch is all that this
package needs. `examples/own_model.py` trains a model with it, `docs/library.md` explains it.
"""

from spannorm.errors import InvalidArgument
from spannorm.initialization import (
    INITS,
    Init,
    b2t_init,
    deepnorm_init,
    deepscalelm_init,
    draw,
    fan_in_init,
    find_init,
    initialize,
    megatron_init,
    plain_init,
    scale_init,
    standard_deviation,
    start_at_unit_variance,
    subln_init,
)
from spannorm.matrices import ROLES, Matrix, OwnsMatrices, Role, owned_matrices
from spannorm.norms import NORMS, Derf, DyT, EmbeddingScale, Gated, GatedNorm, NormFactory, RMSNorm, find_norm
from spannorm.placements.attnres import AttnRes, SourceAttention
from spannorm.placements.b2t import B2T
from spannorm.placements.base import Depth, Placement, QKVNorm, Streams, Sublayer, TwoStreams
from spannorm.placements.deepnorm import DeepNorm
from spannorm.placements.gpas import GPAS
from spannorm.placements.gr import GR
from spannorm.placements.hc import HC
from spannorm.placements.hybridnorm import HybridNorm
from spannorm.placements.hybridnorm_star import HybridNormStar
from spannorm.placements.ihc import IHC
from spannorm.placements.keel import Keel
from spannorm.placements.lnscaling import LNScaling
from spannorm.placements.many_streams import ManyStreams, Mapping
from spannorm.placements.mhc import MHC
from spannorm.placements.mixln import MixLN
from spannorm.placements.outputnorm import OutputNorm
from spannorm.placements.perinorm import PeriNorm
from spannorm.placements.postnorm import PostNorm
from spannorm.placements.prenorm import PreNorm
from spannorm.placements.registry import PLACEMENTS, find_placement
from spannorm.placements.residual import ResiDual
from spannorm.placements.rezero import ReZero
from spannorm.placements.sandwich import Sandwich
from spannorm.placements.siamesenorm import SiameseNorm
from spannorm.placements.spannorm import SpanNorm
from spannorm.placements.subln import SubLN

__all__ = [
    "B2T",
    "GPAS",
    "GR",
    "HC",
    "IHC",
    "INITS",
    "MHC",
    "NORMS",
    "PLACEMENTS",
    "ROLES",
    "AttnRes",
    "DeepNorm",
    "Depth",
    "Derf",
    "DyT",
    "EmbeddingScale",
    "Gated",
    "GatedNorm",
    "HybridNorm",
    "HybridNormStar",
    "Init",
    "InvalidArgument",
    "Keel",
    "LNScaling",
    "ManyStreams",
    "Mapping",
    "Matrix",
    "MixLN",
    "NormFactory",
    "OutputNorm",
    "OwnsMatrices",
    "PeriNorm",
    "Placement",
    "PostNorm",
    "PreNorm",
    "QKVNorm",
    "RMSNorm",
    "ReZero",
    "ResiDual",
    "Role",
    "Sandwich",
    "SiameseNorm",
    "SourceAttention",
    "SpanNorm",
    "Streams",
    "SubLN",
    "Sublayer",
    "TwoStreams",
    "b2t_init",
    "deepnorm_init",
    "deepscalelm_init",
    "draw",
    "fan_in_init",
    "find_init",
    "find_norm",
    "find_placement",
    "initialize",
    "megatron_init",
    "owned_matrices",
    "plain_init",
    "scale_init",
    "standard_deviation",
    "start_at_unit_variance",
    "subln_init",
]
