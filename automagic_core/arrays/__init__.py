"""Axes, names and states of one array (docs/algorithm.md, sections 1 and 6)."""
