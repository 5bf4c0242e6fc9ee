"""Runs between frameworks: the neutral form of their states, and its files (docs/algorithm.md, section 11)."""
