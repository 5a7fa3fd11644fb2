"""Runs the measures of analysis.anatomy on runs, and reports on them."""
