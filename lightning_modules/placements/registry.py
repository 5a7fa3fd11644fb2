"""Every placement by its name. A new one is one file beside this, and one line here."""

from lightning_modules.placements.base import Placement
from lightning_modules.placements.postnorm import PostNorm
from lightning_modules.placements.prenorm import PreNorm
from lightning_modules.placements.spannorm import SpanNorm

PLACEMENTS: dict[str, type[Placement]] = {
    "prenorm": PreNorm,
    "postnorm": PostNorm,
    "spannorm": SpanNorm,
}
