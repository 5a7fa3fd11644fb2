"""Patterns of tags for TensorBoard's tab Custom Scalars: see callbacks.protocols.HasCharts."""

import re

BLOCK = r"block_(\d+|worst)"
"""A block's part of a tag."""


def block_chart(prefix: str, figure: str) -> str:
    """Return the pattern of PREFIX/block_NUMBER/FIGURE, a chart with a line for each block that is written."""
    return rf"^{re.escape(prefix)}/{BLOCK}/{re.escape(figure)}$"
