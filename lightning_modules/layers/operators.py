"""Names of operators of our own, which torch keeps for the whole process."""

import re


def namespace(module: str) -> str:
    """Return the namespace of a module's operators, by its name."""
    return re.sub(r"\W", "_", module)
