"""Bounds on the sizes that a configuration may ask for: a slip of the keyboard is refused, and not computed for hours.

SIZE_LIMITS in the environment multiplies them all. Imports no torch: the typed configuration uses it.
"""

import os

from core.errors import UserError, require

VARIABLE = "SIZE_LIMITS"


def require_at_most(bound: int, field: str, value: int | None) -> None:
    """Refuse a size beyond its bound; None passes.

    Raises:
        ConfigError: names the bound and how to raise it.
        UserError: SIZE_LIMITS is no number of at least 1.
    """
    given = os.environ.get(VARIABLE) or "1"
    try:
        factor = float(given)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1e9:
        raise UserError(f"{VARIABLE}={given!r} is not valid: expected a number from 1 to 1e9, by which bounds grow")
    most = int(bound * factor)
    valid = f"at most {most:,}; {VARIABLE}=10 in the environment makes the bounds on sizes ten times as large"
    require(value is None or value <= most, field, value, valid)
