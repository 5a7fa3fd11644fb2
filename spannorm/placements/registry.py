"""Every placement by its name. One that joins them is a file beside this, its import and its line here."""

import inspect

from spannorm.errors import InvalidArgument
from spannorm.import_path import find
from spannorm.placements.attnres import AttnRes
from spannorm.placements.b2t import B2T
from spannorm.placements.base import Placement
from spannorm.placements.deepnorm import DeepNorm
from spannorm.placements.gr import GR
from spannorm.placements.hc import HC
from spannorm.placements.hybridnorm import HybridNorm
from spannorm.placements.hybridnorm_star import HybridNormStar
from spannorm.placements.ihc import IHC
from spannorm.placements.keel import Keel
from spannorm.placements.lnscaling import LNScaling
from spannorm.placements.mhc import MHC
from spannorm.placements.mixln import MixLN
from spannorm.placements.outputnorm import OutputNorm
from spannorm.placements.perinorm import PeriNorm
from spannorm.placements.postnorm import PostNorm
from spannorm.placements.prenorm import PreNorm
from spannorm.placements.residual import ResiDual
from spannorm.placements.rezero import ReZero
from spannorm.placements.sandwich import Sandwich
from spannorm.placements.siamesenorm import SiameseNorm
from spannorm.placements.spannorm import SpanNorm
from spannorm.placements.subln import SubLN

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
    "hc": HC,
    "mhc": MHC,
    "ihc": IHC,
    "gr": GR,
    "attnres": AttnRes,
}


def find_placement(name: str) -> type[Placement]:
    """Return the placement class of a name in PLACEMENTS, or one of your own by its import path.

    Raises:
        InvalidArgument: there is none of that name, or it is no subclass of Placement.
    """
    found = find("placement", name, PLACEMENTS)
    if not inspect.isclass(found) or not issubclass(found, Placement):
        raise InvalidArgument("placement", name, "a subclass of spannorm.Placement")
    return found
