"""Names of operators of our own, which torch keeps for the whole process."""

import re


def namespace(module: str) -> str:
    """Of a module's operators, by its name: an exported model brings copies of them, whose operators are its own."""
    return re.sub(r"\W", "_", module)
