"""Bounds on the sizes that a configuration may ask for: a slip of the keyboard is refused, and not computed for hours.

SIZE_LIMITS in the environment multiplies them all. Imports no torch: the typed configuration uses it.
"""

import os

from core.errors import UserError, require

VARIABLE = "SIZE_LIMITS"


def factor(variable: str) -> float:
    """Return by how much the user lets bounds grow: what the variable of the environment says, 1 where it is not set.

    Raises:
        UserError: it is no number of at least 1.
    """
    given = os.environ.get(variable) or "1"
    try:
        number = float(given)
    except ValueError:
        number = 0.0
    if not 1 <= number <= 1e9:
        raise UserError(f"{variable}={given!r} is not valid: expected a number from 1 to 1e9, by which bounds grow")
    return number


def require_at_most(bound: int, field: str, value: int | None) -> None:
    """Refuse a size beyond its bound; None passes.

    Raises:
        ConfigError: names the bound and how to raise it.
        UserError: SIZE_LIMITS is no number of at least 1.
    """
    most = int(bound * factor(VARIABLE))
    valid = f"at most {most:,}; {VARIABLE}=10 in the environment makes the bounds on sizes ten times as large"
    require(value is None or value <= most, field, value, valid)
