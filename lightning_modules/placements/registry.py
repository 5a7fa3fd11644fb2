"""Every placement by its name. A new one is one file beside this, its import and its line here."""

from lightning_modules.placements.b2t import B2T
from lightning_modules.placements.base import Placement
from lightning_modules.placements.deepnorm import DeepNorm
from lightning_modules.placements.hybridnorm import HybridNorm
from lightning_modules.placements.hybridnorm_star import HybridNormStar
from lightning_modules.placements.keel import Keel
from lightning_modules.placements.lnscaling import LNScaling
from lightning_modules.placements.mixln import MixLN
from lightning_modules.placements.outputnorm import OutputNorm
from lightning_modules.placements.perinorm import PeriNorm
from lightning_modules.placements.postnorm import PostNorm
from lightning_modules.placements.prenorm import PreNorm
from lightning_modules.placements.residual import ResiDual
from lightning_modules.placements.rezero import ReZero
from lightning_modules.placements.sandwich import Sandwich
from lightning_modules.placements.siamesenorm import SiameseNorm
from lightning_modules.placements.spannorm import SpanNorm
from lightning_modules.placements.subln import SubLN

PLACEMENTS: dict[str, type[Placement]] = {
    "prenorm": PreNorm,
    "postnorm": PostNorm,
    "spannorm": SpanNorm,
    "deepnorm": DeepNorm,
    "b2t": B2T,
    "sandwich": Sandwich,
    "perinorm": PeriNorm,
    "outputnorm": OutputNorm,
    "hybridnorm": HybridNorm,
    "hybridnorm_star": HybridNormStar,
    "mixln": MixLN,
    "lnscaling": LNScaling,
    "subln": SubLN,
    "residual": ResiDual,
    "keel": Keel,
    "siamesenorm": SiameseNorm,
    "rezero": ReZero,
}
