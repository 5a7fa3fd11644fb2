"""Patterns of tags for TensorBoard's tab Custom Scalars: see callbacks.protocols.HasCharts."""

import re


def block_chart(prefix: str, figure: str) -> str:
    """Return the pattern of PREFIX/block_NUMBER/FIGURE, a chart with a line for each block."""
    return rf"^{re.escape(prefix)}/block_\d+/{re.escape(figure)}$"
