"""Stacked arrays: marks, axes, means, averages and gradients (docs/algorithm.md, section 1)."""
