"""Comparison of runs: groups of seeds, tables, plot."""
