"""Imports what only some preparations need."""

import importlib
from typing import Any

from core.errors import InvalidValue


def import_optional(module: str, package: str) -> Any:
    """Return a module of requirements-data.txt.

    Raises:
        InvalidValue: it is not installed; says how.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        remedy = f"{package} is not installed: pip install -r requirements-data.txt"
        raise InvalidValue("input", package, remedy) from error
